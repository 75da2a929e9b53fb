"""Replicas without Ray: which device their networks are on."""

import asyncio
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch

from deployments.annotator import Annotator
from deployments.denoiser import Denoiser
from deployments.process import on_its_device
from serve_app.annotators.cache import KEPT_S
from serve_app.annotators.map_index import MapIndex
from serve_app.config import AnnotatorConfig, AppConfig, DenoiserConfig
from serve_app.database import control_maps
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
async def test_a_replica_that_nobody_asks_deletes_old_maps(tmp_path: Path) -> None:
    """Serve asks for its health when it has started, and every two seconds from then on."""
    replica = Annotator(AppConfig(data=tmp_path))
    database = replica._service._cache._index._database
    old = {"key": "a" * 64, "size_bytes": 1, "used_at": time.time() - KEPT_S - 1, "info": "{}", "digest": "0"}
    with database.transaction() as connection:
        connection.execute(sa.insert(control_maps).values(old))
    for _ in range(2):
        await replica.check_health()
    assert [task.get_name() for task in asyncio.all_tasks()].count("map-sweep") == 1
    async with asyncio.timeout(30):
        while MapIndex(database).known("a" * 64):  # noqa: ASYNC110  - it happens in a thread
            await asyncio.sleep(0.01)
    await replica._service.close()
    assert "map-sweep" not in [task.get_name() for task in asyncio.all_tasks()]


@pytest.mark.usefixtures("on_a_gpus_node")
async def test_denoisers_leave_gpus_of_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.denoiser.replica_name", lambda: "a")  # of Serve's context
    monkeypatch.setattr("deployments.denoiser.node_name", lambda: "b")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    replica = Denoiser(AppConfig(data=tmp_path), "Denoiser")
    assert (await replica.stats()).device == "cpu"
    await replica._generator.close()
    replica._cache.close()
