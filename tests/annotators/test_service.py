"""What an annotator replica does: real detectors behind the cache, maps stored as pictures, errors that help."""

import asyncio
import base64
import errno
import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from serve_app.annotators.identity import Identity
from serve_app.annotators.service import AnnotatorService
from serve_app.annotators.weights import WeightStore
from serve_app.config import AnnotatorConfig
from serve_app.database import Database
from serve_app.errors import AnnotatorUnavailable, JobError, ModelLoadFailed, RetryableError
from serve_app.images import resize_image
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from serve_app.tasks import AnnotationTask, ControlMap, ImageArray, MapOutput
from support.detectors import make_store

PHOTO: ImageArray = resize_image(skimage.data.astronaut(), 96, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    return make_store(tmp_path_factory.mktemp("weights"), "depth_anything_v2")


@dataclass
class Replica:
    service: AnnotatorService
    meter: PrometheusMeter

    def runs(self, annotator: str) -> float:
        value = self.meter.registry.get_sample_value("controlnet_annotator_runs_total", {"annotator": annotator})
        return value or 0.0


Start = Callable[..., Replica]


@pytest.fixture
def start(database: Database, weights: WeightStore, tmp_path: Path) -> Start:
    def start(
        store: WeightStore = weights, objects: LocalStore | None = None, meter: PrometheusMeter | None = None
    ) -> Replica:
        meter = meter or PrometheusMeter()
        used = objects or LocalStore(tmp_path / "objects")
        return Replica(AnnotatorService(AnnotatorConfig(device="cpu"), store, database, used, meter), meter)

    return start


def task(control_type: str = "depth", width: int = 96, **params: float) -> AnnotationTask:
    return AnnotationTask(control_type=control_type, width=width, height=64, params=params)


@pytest.mark.parametrize("control_type", ["depth", "canny"])
async def test_three_at_once_run_one_detector(start: Start, control_type: str) -> None:
    replica = start()
    maps = await asyncio.gather(*(replica.service.annotate(task(control_type), PHOTO, None, None) for _ in range(3)))
    (info,) = {one.model_dump_json(): one for _, one in maps}.values()
    assert replica.runs(info.annotator) == 1
    assert all(np.array_equal(pixels, maps[0][0]) for pixels, _ in maps)
    assert (replica.service.calls, replica.service.runs) == (3, 1)
    await replica.service.close()


async def test_replicas_share_what_takes_a_network(start: Start) -> None:
    first, second = start(), start()
    made, _ = await first.service.annotate(task(), PHOTO, None, None)
    found, info = await second.service.annotate(task(), PHOTO, None, None)
    assert np.array_equal(made, found)
    assert (info.annotator, dict(info.params)) == ("depth_anything_v2", {"resolution": 0})
    assert (first.runs("depth_anything_v2"), second.runs("depth_anything_v2")) == (1, 0)
    for other in (task(resolution=64), task(width=64)):
        await second.service.annotate(other, PHOTO, None, None)
    await second.service.annotate(task(), np.ascontiguousarray(PHOTO[:, ::-1]), None, None)
    assert second.runs("depth_anything_v2") == 3
    for control_type, runs in (("canny", 1), ("tile", 2)):
        kind = task(control_type)
        await asyncio.gather(*(second.service.annotate(kind, PHOTO, None, None) for _ in range(2)))
        assert second.runs(control_type) == runs
        await first.service.annotate(kind, PHOTO, None, None)
        assert first.runs(control_type) == 1


async def test_control_types_share_the_maps_of_one_annotator(start: Start) -> None:
    replica = start()
    kinds = ("canny", "aesthetic-controlnet", "canny")
    infos = [(await replica.service.annotate(task(kind), PHOTO, None, None))[1] for kind in kinds]
    assert [info.control_type for info in infos] == list(kinds)
    assert replica.runs("canny") == 1
    await replica.service.close()


def swap(store: WeightStore) -> None:
    """Replace the weights of depth by others of the same size, as a fetch does; a second time: put them back."""
    path = store.require("depth_anything_v2")
    kept = path.with_suffix(".kept")
    other = path.with_suffix(".new")
    if kept.exists():
        kept.replace(path)
        return
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half:] = data[half:].translate(bytes([*range(256)]).replace(b"\x3c", b"\x3d"))
    other.write_bytes(data)
    path.rename(kept)
    other.replace(path)


async def depth(replica: Replica, resolution: int = 0) -> ControlMap:
    return (await replica.service.annotate(task(resolution=resolution), PHOTO, None, None))[0]


async def test_other_weights_make_other_maps(start: Start, tmp_path: Path) -> None:
    store = make_store(tmp_path / "weights", "depth_anything_v2")
    replica = start(store)
    before = await depth(replica)
    swap(store)
    # This replica has the old network in memory: what it makes now is nobody else's.
    await depth(replica, resolution=64)
    again = start(store)
    after = await depth(again)
    await depth(again, resolution=64)
    assert again.runs("depth_anything_v2") == 2
    assert not np.array_equal(before, after)
    swap(store)
    assert np.array_equal(await depth(start(store)), before)


async def test_a_map_of_weights_replaced_before_they_were_loaded_is_not_kept_as_theirs(
    start: Start, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "weights", "depth_anything_v2")
    replica = start(store)
    hashed = replica.service._identities.of

    def and_swap(annotator: str) -> Identity | None:
        identity = hashed(annotator)
        swap(store)
        return identity

    replica.service._identities.of = and_swap  # type: ignore[method-assign]
    swapped = await depth(replica)
    replica.service._identities.of = hashed  # type: ignore[method-assign]
    assert np.array_equal(await depth(replica), swapped)
    assert (replica.service.calls, replica.service.runs) == (2, 2)
    swap(store)
    assert not np.array_equal(await depth(start(store)), swapped)


async def test_maps_are_stored_as_pictures(start: Start, tmp_path: Path) -> None:
    objects = LocalStore(tmp_path / "objects")
    replica = start()
    edges, _ = await replica.service.annotate(task("canny"), PHOTO, None, MapOutput(key="attempts/1/1/a.png"))
    assert np.array_equal(edges[:, :, 0], cv2.Canny(PHOTO, 100, 200))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(objects.get("attempts/1/1/a.png")))), edges)
    text = MapOutput(key="attempts/1/1/b.png", base64_text=True)
    for _ in range(2):  # made, then cached
        depth, _ = await replica.service.annotate(task(), PHOTO, None, text)
        data = base64.b64decode(objects.get(text.key))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), depth)
    mask = np.zeros((64, 96), np.uint8)
    mask[:32] = 255
    hole, _ = await replica.service.annotate(task("inpaint"), PHOTO, mask, MapOutput(key="attempts/1/1/c.png"))
    shown = np.asarray(Image.open(io.BytesIO(objects.get("attempts/1/1/c.png"))))
    assert (hole[:32] == -1).all()
    assert not shown[:32].any()
    assert np.array_equal(shown[32:], PHOTO[32:])


class RefusingStore(LocalStore):
    """Refuses what goes under the attempts."""

    number = errno.ENOSPC

    def put(self, key: str, data: bytes, content_type: str) -> None:
        if key.startswith("attempts/"):
            raise OSError(self.number, os.strerror(self.number))
        super().put(key, data, content_type)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, JobError), (errno.EIO, RetryableError)])
async def test_a_store_that_refuses(start: Start, tmp_path: Path, number: int, kind: type[Exception]) -> None:
    store = RefusingStore(tmp_path / "objects")
    store.number = number
    with pytest.raises(kind):
        await start(objects=store).service.annotate(task("canny"), PHOTO, None, MapOutput(key="attempts/1/1/a.png"))


async def test_missing_weights_are_told_before_and_when_asked_for(start: Start, tmp_path: Path) -> None:
    replica = start(WeightStore(tmp_path / "empty"))
    stats = replica.service.stats("a", "node")
    assert "controlnet-serve weights fetch midas" in stats.missing["midas"]
    assert not {"canny", "shuffle", "xdog"} & set(stats.missing)
    with pytest.raises(AnnotatorUnavailable, match=r"Depth-Anything.*Apache.*controlnet-serve weights fetch"):
        await replica.service.annotate(task(), PHOTO, None, None)
    assert replica.runs("depth_anything_v2") == 0
    assert start().service.stats("b", "node").missing.keys() == stats.missing.keys() - {"depth_anything_v2"}


class SlowMeter(PrometheusMeter):
    """Holds the thread of a detector that has run until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.now = 0
        self.most = 0

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        super().count(name, amount, **labels)
        if labels.get("annotator") == "depth_anything_v2":
            self.now += 1
            self.most = max(self.most, self.now)
            assert self.gate.wait(60)
            self.now -= 1


async def test_detectors_run_one_at_a_time_and_others_beside_them(start: Start) -> None:
    meter = SlowMeter()
    service = start(meter=meter).service
    slow = [asyncio.create_task(service.annotate(task(resolution=size), PHOTO, None, None)) for size in (64, 128, 192)]
    while not meter.now:  # noqa: ASYNC110  - it happens in a thread
        await asyncio.sleep(0.01)
    await service.annotate(task("canny"), PHOTO, None, None)  # not behind them
    assert not any(one.done() for one in slow)
    meter.gate.set()
    await asyncio.gather(*slow)
    assert (meter.most, service.runs) == (1, 4)


async def test_detectors_that_wait_leave_places_for_cheap_maps(start: Start) -> None:
    """Serve lets so many calls into a replica. There were four places once, which as many detectors filled."""
    meter = SlowMeter()
    service = start(meter=meter).service
    places = asyncio.Semaphore(AnnotatorConfig().max_ongoing)

    async def call(wanted: AnnotationTask) -> None:
        async with places:
            await service.annotate(wanted, PHOTO, None, None)

    slow = [asyncio.create_task(call(task().model_copy(update={"seed": seed}))) for seed in range(12)]
    while not meter.now:  # noqa: ASYNC110  - it happens in a thread
        await asyncio.sleep(0.01)
    await asyncio.wait_for(call(task("canny")), 60)
    assert not any(one.done() for one in slow)
    meter.gate.set()
    await asyncio.gather(*slow)


@pytest.mark.parametrize("control_type", ["tile", "canny", "none", "depth"])
async def test_nobody_can_write_into_a_map(start: Start, control_type: str) -> None:
    wanted = task("canny" if control_type == "none" else control_type)
    if control_type == "none":
        wanted = wanted.model_copy(update={"auto_hint": False})
    made, _ = await start().service.annotate(wanted, PHOTO, None, None)
    assert not made.flags.writeable
    assert PHOTO.flags.writeable


async def test_damaged_weights_are_missing_once_they_were_tried_until_they_change(start: Start, tmp_path: Path) -> None:
    store = make_store(tmp_path / "weights", "depth_anything_v2")
    path = store.require("depth_anything_v2")
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    replica = start(store)

    def missing() -> str | None:
        return replica.service.stats("a", "node").missing.get("depth_anything_v2")

    assert missing() is None
    with pytest.raises(ModelLoadFailed):
        await depth(replica)
    told = missing()
    assert told is not None
    assert "are damaged" in told
    assert "controlnet-serve weights verify depth_anything_v2" in told
    path.write_bytes(good)
    assert missing() is None
    await depth(replica)
    assert missing() is None


async def test_cancelled_calls_leave_no_work_behind(start: Start) -> None:
    meter = SlowMeter()
    service = start(meter=meter).service
    first = asyncio.create_task(service.annotate(task(resolution=64), PHOTO, None, None))
    while not meter.now:  # noqa: ASYNC110  - it happens in a thread
        await asyncio.sleep(0.01)
    others = [asyncio.create_task(service.annotate(task(resolution=s), PHOTO, None, None)) for s in (128, 192)]
    await asyncio.sleep(0.2)  # they wait their turn by now
    for other in others:
        other.cancel()
    await asyncio.wait(others)
    meter.gate.set()
    await first
    await service.close()
    assert service.runs == 1
