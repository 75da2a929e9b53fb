"""Replicas without Ray: which device their networks are on."""

from pathlib import Path

import pytest
import torch

from deployments.annotator import Annotator
from deployments.denoiser import Denoiser
from deployments.process import on_its_device
from serve_app.config import AnnotatorConfig, AppConfig, DenoiserConfig
from support.detectors import make_store


@pytest.mark.parametrize(
    ("num_gpus", "device", "resolved"),
    [(0, "auto", "cpu"), (0.25, "auto", "auto"), (0, "cuda", "cuda"), (1, "cpu", "cpu")],
)
def test_auto_without_a_gpu_of_its_own_is_the_cpu(num_gpus: float, device: str, resolved: str) -> None:
    assert on_its_device(AnnotatorConfig(num_gpus=num_gpus, device=device)).device == resolved
    assert on_its_device(DenoiserConfig(num_gpus=num_gpus, device=device)).device == resolved


@pytest.fixture
def on_a_gpus_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an actor with num_gpus=0 sees it there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kind in (Annotator, Denoiser):
        monkeypatch.delattr(kind, "__del__")  # Serve awaits it; the interpreter would not


@pytest.mark.usefixtures("on_a_gpus_node")
def test_detectors_leave_gpus_of_others_alone(tmp_path: Path) -> None:
    make_store(tmp_path / "annotators", "depth_anything_v2")
    replica = Annotator(AppConfig(data=tmp_path))
    with replica._service._host.lease(("depth_anything_v2",)) as networks:
        assert next(networks["depth_anything_v2"].parameters()).device.type == "cpu"


@pytest.mark.usefixtures("on_a_gpus_node")
async def test_denoisers_leave_gpus_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.denoiser.replica_name", lambda: "a")  # of Serve's context
    monkeypatch.setattr("deployments.denoiser.node_name", lambda: "b")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    replica = Denoiser(AppConfig(data=tmp_path), "Denoiser")
    assert (await replica.stats()).device == "cpu"
    await replica._generator.close()
    replica._cache.close()
