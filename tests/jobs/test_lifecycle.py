"""Acceptance, waiting, and what one attempt fetches, annotates and draws."""

import asyncio
import dataclasses
import errno
import io
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from serve_app.annotators import ANNOTATORS, annotate
from serve_app.config import ImageLimits, LimitsConfig
from serve_app.controls import CONTROL_TYPES
from serve_app.database import Database
from serve_app.errors import (
    FetchFailed,
    ImageRejected,
    JobError,
    NotFound,
    QueueFull,
    RetryableError,
    WorkerBusy,
    WorkerLost,
)
from serve_app.fetching import GuardedClient
from serve_app.images import decode_image, decode_mask, encode_png
from serve_app.jobs.job import InputRef, Job, JobStatus
from serve_app.jobs.lifecycle import DECODES_AT_ONCE, JobWaiter, Workshop, input_key, run_attempt, submit
from serve_app.jobs.store import JobStore
from serve_app.storage.local import LocalStore
from serve_app.tasks import ControlInput, Mode
from support.backend import ScriptedBackend
from support.jobs import ALICE, BOB, RESULT, make_spec
from support.web import LOCAL, WebServer, web_server


def png(value: int = 128, size: tuple[int, int] = (32, 16)) -> bytes:
    """A picture of one grey, ``size`` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


class FullStore(LocalStore):
    """A disk that is full while ``full``, after ``room`` more objects."""

    def __init__(self, root: Path, room: int = 0) -> None:
        super().__init__(root)
        self.full = True
        self.room = room

    def put(self, key: str, data: bytes, content_type: str) -> None:
        if self.full and self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        super().put(key, data, content_type)


class SlowStore(LocalStore):
    """Reading waits for ``go``; ``readers`` are in it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go = threading.Event()
        self.readers = 0

    def get(self, key: str) -> bytes:
        self.readers += 1
        assert self.go.wait(20)
        return super().get(key)


@pytest.fixture
async def web() -> AsyncIterator[WebServer]:
    async with web_server() as web:
        yield web


@pytest.fixture
async def client() -> AsyncIterator[GuardedClient]:
    async with GuardedClient(LOCAL) as client:
        yield client


@pytest.fixture
def backend(objects: LocalStore) -> ScriptedBackend:
    return ScriptedBackend(objects)


@pytest.fixture
def shop(store: JobStore, objects: LocalStore, backend: ScriptedBackend, client: GuardedClient) -> Workshop:
    return Workshop(store, objects, backend, client, ImageLimits())


def claim(store: JobStore) -> Job:
    (job,) = store.claim("one", 1, 100, 60.0)
    return job


# Acceptance


async def test_inline_pictures_are_stored_by_content_before_the_row(
    store: JobStore, objects: LocalStore, stored: Callable[[], set[str]]
) -> None:
    spec = make_spec(inputs=(InputRef(field="control_image.0", url="https://h/a"), InputRef(field="init_image")))
    inline = {"init_image": png(1), "mask_image": png(1)}
    job = await submit(store, objects, ALICE, spec, inline)
    key = input_key(png(1))
    assert key.startswith("inputs/")
    assert stored() == {key}
    assert {ref.field: ref.key or ref.url for ref in job.spec.inputs} == {
        "control_image.0": "https://h/a",
        "init_image": key,
        "mask_image": key,
    }
    assert store.get(job.id) == job


async def test_a_refused_request_leaves_no_objects(
    database: Database, objects: LocalStore, stored: Callable[[], set[str]]
) -> None:
    store = JobStore(database, LimitsConfig(queue_max=1))
    kept = await submit(store, objects, ALICE, make_spec(), {"init_image": png(1)})
    for picture in (png(1), png(2)):
        with pytest.raises(QueueFull):
            await submit(store, objects, BOB, make_spec(), {"init_image": picture})
    assert stored() == {input_key(png(1))}
    assert store.get(kept.id) == kept


@pytest.mark.parametrize("room", [0, 1])
async def test_a_full_disk_refuses_and_loses_nothing(
    store: JobStore, tmp_path: Path, stored: Callable[[], set[str]], room: int
) -> None:
    disk = FullStore(tmp_path / "objects", room=1)
    accepted = await submit(store, disk, ALICE, make_spec(), {"init_image": png(0)})
    disk.room = room
    with pytest.raises(WorkerBusy, match="No space left on device"):
        await submit(store, disk, ALICE, make_spec(), {"init_image": png(1), "mask_image": png(2)})
    assert store.counts()[JobStatus.QUEUED] == 1
    assert stored() == {input_key(png(0))}
    disk.full = False
    await submit(store, disk, ALICE, make_spec(), {"init_image": png(1)})
    assert store.get(accepted.id) == accepted
    assert disk.get(input_key(png(0))) == png(0)


# Waiting


async def test_a_waiter_gets_the_job_when_it_ends(store: JobStore) -> None:
    waiter = JobWaiter(store)
    job = store.submit(ALICE, make_spec())
    waiting = [asyncio.create_task(waiter.wait(job.id, 10.0)) for _ in range(3)]
    await asyncio.sleep(0.15)
    assert not any(task.done() for task in waiting)
    store.finish(job.id, claim(store).attempt, RESULT)
    for ended in await asyncio.gather(*waiting):
        assert (ended.id, ended.status) == (job.id, JobStatus.SUCCESS)


async def test_a_waiter_that_runs_out_of_time_gets_the_job_as_it_is(store: JobStore) -> None:
    waiter = JobWaiter(store)
    job = store.submit(ALICE, make_spec())
    started = time.monotonic()
    assert (await waiter.wait(job.id, 0.2)).status is JobStatus.QUEUED
    assert 0.2 <= time.monotonic() - started < 2
    assert (await waiter.wait(job.id, 0)).status is JobStatus.QUEUED
    with pytest.raises(NotFound):
        await waiter.wait(5, 0.1)


async def test_a_cancelled_waiter_disturbs_no_other(store: JobStore) -> None:
    waiter = JobWaiter(store)
    job = store.submit(ALICE, make_spec())
    leaving, staying = (asyncio.create_task(waiter.wait(job.id, 10.0)) for _ in range(2))
    await asyncio.sleep(0.1)
    leaving.cancel()
    await asyncio.sleep(0.1)
    store.request_cancel(job.id)
    assert (await staying).status is JobStatus.CANCELLED


async def test_five_hundred_waiters_share_one_query_per_tick(store: JobStore, database: Database) -> None:
    jobs = [store.submit(ALICE, make_spec()) for _ in range(500)]
    queries = Counter[str]()
    sa.event.listen(
        database.engine,
        "before_cursor_execute",
        lambda _connection, _cursor, statement, *_: queries.update([statement.split()[0]]),
    )
    waiter = JobWaiter(store, tick_s=0.1)
    waiting = [asyncio.create_task(waiter.wait(job.id, 30.0)) for job in jobs]
    await asyncio.sleep(1.05)
    assert 2 <= queries["SELECT"] <= 11
    for job in jobs:
        await asyncio.to_thread(store.request_cancel, job.id)
    queries.clear()
    ended = await asyncio.gather(*waiting)
    assert {job.id for job in ended} == {job.id for job in jobs}
    assert queries["SELECT"] <= 5
    queries.clear()
    await asyncio.sleep(0.3)
    assert queries["SELECT"] == 0  # nobody waits: nobody asks


# One attempt


async def test_an_attempt_makes_each_map_once_and_draws(shop: Workshop, backend: ScriptedBackend) -> None:
    controls = (("canny", "init_image"), ("tile", "control_image.1"), ("canny", "init_image"))
    spec = make_spec(controls=controls, mode=Mode.IMAGE)
    inline = {"init_image": png(10), "control_image.1": png(20, (8, 8))}
    await submit(shop.store, shop.objects, ALICE, spec, inline)
    result = await run_attempt(shop, claim(shop.store))
    made = {task.control_type: (image.shape, image.max(), mask) for task, image, mask in backend.annotated}
    assert made == {"canny": ((64, 64, 3), 10, None), "tile": ((64, 64, 3), 20, None)}
    assert len(backend.annotated) == 2
    ((init_image, mask, maps),) = backend.drawn_with
    assert init_image is not None
    assert init_image.shape == (64, 64, 3)
    assert mask is None
    assert maps[0] == maps[2] != maps[1]
    assert [info.control_type for info in result.annotators] == ["canny", "tile", "canny"]
    assert all(shop.objects.get(key) == b"picture" for key in result.keys)
    assert (backend.attempts[0].attempt, backend.attempts[0].alone) == (1, False)


async def test_a_mask_reaches_the_inpaint_map_and_the_engine(shop: Workshop, backend: ScriptedBackend) -> None:
    spec = make_spec(controls=(("inpaint", "init_image"),), mode=Mode.MASKED)
    await submit(shop.store, shop.objects, ALICE, spec, {"init_image": png(10), "mask_image": png(255)})
    await run_attempt(shop, claim(shop.store))
    (_, _, annotation_mask), (_, drawing_mask, _) = backend.annotated[0], backend.drawn_with[0]
    assert annotation_mask is not None
    assert np.array_equal(annotation_mask, np.full((64, 64), 255))
    assert drawing_mask is annotation_mask


@pytest.mark.parametrize("size", [(150, 90), (20, 30), (64, 64)])
async def test_pictures_at_the_outputs_size_change_no_map_and_no_latent(
    shop: Workshop, backend: ScriptedBackend, size: tuple[int, int]
) -> None:
    """What gets the pictures as decoded and what gets them already resized make the same of them."""
    random = np.random.default_rng(5)
    photo, mask = (encode_png(random.integers(0, 256, (size[1], size[0], *rest), np.uint8)) for rest in ((3,), ()))
    weightless = [kind for kind, row in CONTROL_TYPES.items() if not ANNOTATORS[row.annotator].networks]
    kinds = [(kind, True) for kind in weightless] + [(kind, False) for kind in CONTROL_TYPES]
    controls = tuple(ControlInput(net="n", control_type=kind, auto_hint=hint) for kind, hint in kinds)
    spec = make_spec(mode=Mode.MASKED)
    guided = spec.task.model_copy(update={"controls": controls})
    spec = spec.model_copy(update={"task": guided, "control_sources": ("init_image",) * len(kinds)})
    await submit(shop.store, shop.objects, ALICE, spec, {"init_image": photo, "mask_image": mask})
    await run_attempt(shop, claim(shop.store))
    whole, whole_mask = decode_image(photo, shop.limits), decode_mask(mask, shop.limits)
    assert {(task.control_type, task.auto_hint) for task, _, _ in backend.annotated} == set(kinds)
    for task, image, fitted_mask in backend.annotated:
        assert image.shape == (64, 64, 3)
        assert np.array_equal(annotate(task, image, fitted_mask)[0], annotate(task, whole, whole_mask)[0]), task
    ((drawn, drawn_mask, _),) = backend.drawn_with
    assert drawn is not None
    assert drawn_mask is not None
    cut = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    for processor, fitted, original in ((VaeImageProcessor(), drawn, whole), (cut, drawn_mask, whole_mask)):
        tensors = [processor.preprocess(Image.fromarray(pixels), 64, 64) for pixels in (fitted, original)]
        assert torch.equal(*tensors)


async def test_the_seed_moves_no_map(shop: Workshop, backend: ScriptedBackend) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (2, 64, 64, 3), np.uint8)
    for seed, picture in ((7, noise[0]), (8, noise[0]), (7, noise[1])):
        spec = make_spec(controls=(("shuffle", "init_image"),))
        spec = spec.model_copy(update={"task": spec.task.model_copy(update={"seed": seed})})
        await submit(shop.store, shop.objects, ALICE, spec, {"init_image": encode_png(picture)})
        await run_attempt(shop, claim(shop.store))
    one, same, other = (task for task, _, _ in backend.annotated)
    assert one == same
    assert one.seed != other.seed


async def test_few_pictures_of_an_attempt_are_at_their_own_size(shop: Workshop, backend: ScriptedBackend) -> None:
    """Eight pictures of 12 MB: as many as are decoded at once take memory, all of them together are 96 MB."""
    sources = tuple(f"control_image.{k}" for k in range(8))
    spec = make_spec(controls=tuple(("tile", source) for source in sources))
    inline = {source: png(k, (2000, 2000)) for k, source in enumerate(sources)}
    await submit(shop.store, shop.objects, ALICE, spec, inline)
    tracemalloc.start()
    try:
        await run_attempt(shop, claim(shop.store))
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sorted(int(image[0, 0, 0]) for _, image, _ in backend.annotated) == list(range(8))
    assert peak < 70_000_000
    assert now < 5_000_000


async def test_cancelled_attempts_do_not_widen_the_limit(shop: Workshop, tmp_path: Path) -> None:
    """A thread can't be stopped: what it decodes counts until it is done, whoever still wants it."""
    slow = SlowStore(tmp_path / "slow")
    shop = dataclasses.replace(shop, objects=slow)
    await submit(shop.store, slow, ALICE, make_spec(mode=Mode.IMAGE), {"init_image": png()})
    job = claim(shop.store)
    for _ in range(2 * DECODES_AT_ONCE):
        attempt = asyncio.create_task(run_attempt(shop, job))
        await asyncio.sleep(0.1)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
    last = asyncio.create_task(run_attempt(shop, job))
    await asyncio.sleep(0.1)
    assert slow.readers == DECODES_AT_ONCE
    slow.go.set()
    assert (await last).keys


async def test_without_controls_only_the_engine_is_called(shop: Workshop, backend: ScriptedBackend) -> None:
    await submit(shop.store, shop.objects, ALICE, make_spec(), {"init_image": png()})
    await run_attempt(shop, claim(shop.store))
    assert backend.annotated == []
    assert backend.drawn_with == [(None, None, ())]


async def test_a_link_is_fetched_once_for_all_attempts(
    shop: Workshop, backend: ScriptedBackend, web: WebServer
) -> None:
    web.body = png(10)
    source = InputRef(field="init_image", url=f"{web.url}/a.png")
    job = shop.store.submit(ALICE, make_spec(inputs=(source,), controls=(("canny", "init_image"),)))
    backend.script = [WorkerLost()]
    with pytest.raises(WorkerLost):
        await run_attempt(shop, claim(shop.store))
    web.body = png(200)
    shop.store.release(job.id, 1, suspect=True)
    await run_attempt(shop, claim(shop.store))
    assert len(web.requests) == 1
    first, second = (image for _, image, _ in backend.annotated)
    assert np.array_equal(first, second)
    assert backend.attempts[1].alone


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, b"", FetchFailed, "Unable to fetch image from provided URL (init_image)"),
        (200, b"not a picture", ImageRejected, "(init_image)"),
    ],
)
async def test_trouble_with_a_link_names_its_field(
    shop: Workshop, web: WebServer, status: int, body: bytes, error: type[JobError], message: str
) -> None:
    web.status, web.body = status, body
    source = InputRef(field="init_image", url=f"{web.url}/a.png")
    shop.store.submit(ALICE, make_spec(inputs=(source,), mode=Mode.IMAGE))
    with pytest.raises(error) as failure:
        await run_attempt(shop, claim(shop.store))
    assert message in failure.value.message


async def test_an_overtaken_attempt_keeps_no_bytes(
    shop: Workshop, web: WebServer, stored: Callable[[], set[str]]
) -> None:
    web.body = png()
    source = InputRef(field="init_image", url=f"{web.url}/a.png")
    job = shop.store.submit(ALICE, make_spec(inputs=(source,), mode=Mode.IMAGE))
    old = claim(shop.store)
    shop.store.release(job.id, old.attempt, suspect=False)
    with pytest.raises(RetryableError, match="another attempt"):
        await run_attempt(shop, old)
    assert stored() == set()


async def test_a_full_disk_fails_the_job_with_a_reason(
    store: JobStore, client: GuardedClient, backend: ScriptedBackend, web: WebServer, tmp_path: Path
) -> None:
    web.body = png()
    shop = Workshop(store, FullStore(tmp_path / "full"), backend, client, ImageLimits())
    source = InputRef(field="init_image", url=f"{web.url}/a.png")
    store.submit(ALICE, make_spec(inputs=(source,), mode=Mode.IMAGE))
    with pytest.raises(JobError, match="no space left to store init_image"):
        await run_attempt(shop, claim(store))


async def test_a_picture_that_vanished_is_told(shop: Workshop) -> None:
    await submit(shop.store, shop.objects, ALICE, make_spec(mode=Mode.IMAGE), {"init_image": png()})
    shop.objects.delete(input_key(png()))
    with pytest.raises(JobError, match="stored picture of init_image is missing"):
        await run_attempt(shop, claim(shop.store))
