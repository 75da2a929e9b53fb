"""Acceptance, waiting, and what one attempt fetches, annotates and draws."""

import asyncio
import errno
import io
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image
from support.backend import ScriptedBackend
from support.jobs import ALICE, BOB, RESULT, make_spec
from support.web import LOCAL, WebServer, web_server

from serve_app.config import ImageLimits, LimitsConfig
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
from serve_app.jobs.job import InputRef, Job, JobStatus
from serve_app.jobs.lifecycle import JobWaiter, Workshop, input_key, run_attempt, submit
from serve_app.jobs.store import JobStore
from serve_app.storage.local import LocalStore
from serve_app.tasks import Mode


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
    made = {task.control_type: (image.shape, mask) for task, image, mask in backend.annotated}
    assert made == {"canny": ((16, 32, 3), None), "tile": ((8, 8, 3), None)}
    assert len(backend.annotated) == 2
    ((init_image, mask, maps),) = backend.drawn_with
    assert init_image is not None
    assert init_image.shape == (16, 32, 3)
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
    assert np.array_equal(annotation_mask, np.full((16, 32), 255))
    assert drawing_mask is annotation_mask


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
