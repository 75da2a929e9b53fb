"""The annotator replica without Ray: which device its detectors are on."""

from pathlib import Path

import pytest
import torch

from deployments.annotator import Annotator, on_its_device
from serve_app.config import AnnotatorConfig, AppConfig
from support.detectors import make_store


@pytest.mark.parametrize(
    ("num_gpus", "device", "resolved"),
    [(0, "auto", "cpu"), (0.25, "auto", "auto"), (0, "cuda", "cuda"), (1, "cpu", "cpu")],
)
def test_auto_without_a_gpu_of_its_own_is_the_cpu(num_gpus: float, device: str, resolved: str) -> None:
    assert on_its_device(AnnotatorConfig(num_gpus=num_gpus, device=device)).device == resolved


def test_gpus_that_belong_to_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "annotators", "depth_anything_v2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as in an actor with num_gpus=0 on a GPU's node
    monkeypatch.delattr(Annotator, "__del__")  # Serve awaits it; the interpreter would not
    replica = Annotator(AppConfig(data=tmp_path))
    with replica._service._host.lease(("depth_anything_v2",)) as networks:
        assert next(networks["depth_anything_v2"].parameters()).device.type == "cpu"
