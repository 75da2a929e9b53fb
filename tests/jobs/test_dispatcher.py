"""Dispatchers at work: success, loss, cancellation, capacity, shutdown, clean-up."""

import asyncio
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from serve_app.config import AppConfig, DispatcherConfig
from serve_app.database import Database, jobs
from serve_app.errors import Cancelled, JobError, OutOfMemory, UnknownModel, WorkerBusy, WorkerLost
from serve_app.fetching import GuardedClient
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.job import JobStatus
from serve_app.jobs.lifecycle import submit
from serve_app.jobs.store import JobStore
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from support.backend import HANG, ScriptedBackend
from support.dispatch import Start, end_of, now, until
from support.jobs import ALICE, make_spec
from support.web import LOCAL


async def test_a_job_from_acceptance_to_success(
    start: Start,
    store: JobStore,
    objects: LocalStore,
    stored: Callable[[], set[str]],
    registry: CollectorRegistry,
    png: bytes,
) -> None:
    spec = make_spec(controls=(("canny", "init_image"),))
    async with start(poll_s=30.0) as dispatcher:
        await asyncio.sleep(0.1)
        job = await submit(store, objects, ALICE, spec, {"init_image": png})
        dispatcher.nudge()  # the next poll is half a minute away
        ended = await end_of(store, job)
    assert (ended.status, ended.attempt) == (JobStatus.SUCCESS, 1)
    assert ended.result is not None
    assert ended.result.keys == (f"attempts/{job.id}/1/{spec.output.file_prefix}-0.png",)
    # The pictures stay, the inputs are gone.
    assert stored() == {*ended.result.keys, f"attempts/{job.id}/1/partial"}
    assert registry.get_sample_value("controlnet_jobs_ended_total", {"status": "success"}) == 1
    assert registry.get_sample_value("controlnet_job_seconds_count", {"status": "success"}) == 1


@pytest.mark.parametrize("loss", [WorkerLost(), OutOfMemory()])
async def test_after_a_dead_worker_the_job_runs_alone(
    start: Start, store: JobStore, backend: ScriptedBackend, stored: Callable[[], set[str]], loss: Exception
) -> None:
    backend.script = [loss, WorkerBusy()]
    async with start():
        job = store.submit(ALICE, make_spec())
        ended = await end_of(store, job)
    assert (ended.status, ended.attempt, ended.charged) == (JobStatus.SUCCESS, 3, 0)
    assert [ref.alone for ref in backend.attempts] == [False, True, True]
    assert {key.rsplit("/", 1)[0] for key in stored()} == {f"attempts/{job.id}/3"}


async def test_a_job_that_kills_every_worker_is_given_up(
    start: Start, store: JobStore, backend: ScriptedBackend, stored: Callable[[], set[str]]
) -> None:
    backend.script = [WorkerLost() for _ in range(20)]
    async with start(max_attempts=3):
        ended = await end_of(store, store.submit(ALICE, make_spec()))
    assert (ended.status, ended.attempt) == (JobStatus.FAILED, 3)
    assert "tried 3 times" in (ended.error or "")
    assert [ref.alone for ref in backend.attempts] == [False, True, True]
    assert stored() == set()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnknownModel("no model 'x'"), "no model 'x'"),
        (JobError("impossible"), "impossible"),
        (ZeroDivisionError("a secret path"), "Internal server error"),
    ],
)
async def test_an_error_that_no_retry_would_mend(
    start: Start, store: JobStore, backend: ScriptedBackend, error: Exception, message: str
) -> None:
    backend.script = [error]
    async with start():
        ended = await end_of(store, store.submit(ALICE, make_spec()))
    assert (ended.status, ended.error, ended.attempt) == (JobStatus.FAILED, message, 1)


async def test_an_attempt_that_takes_too_long_is_stopped_and_charged_to_nobody(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    backend.script = [HANG]
    async with start(attempt_timeout_s=0.3):
        ended = await end_of(store, store.submit(ALICE, make_spec()))
    assert (ended.status, ended.attempt, ended.charged, ended.suspect) == (JobStatus.SUCCESS, 2, 0, False)
    assert [ref.attempt for ref in backend.cancelled] == [1]


async def test_a_running_job_is_cancelled(
    start: Start, store: JobStore, backend: ScriptedBackend, stored: Callable[[], set[str]]
) -> None:
    backend.script = [HANG]
    async with start():
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(stored()))
        store.request_cancel(job.id)
        ended = await end_of(store, job, 3.0)
        assert ended.status is JobStatus.CANCELLED
        assert [(ref.job_id, ref.attempt) for ref in backend.cancelled] == [(job.id, 1)]
    assert stored() == set()


async def test_a_backend_that_says_cancelled_ends_the_job_so(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    backend.script = [Cancelled()]
    async with start():
        ended = await end_of(store, store.submit(ALICE, make_spec()))
    assert ended.status is JobStatus.CANCELLED


async def test_an_overtaken_attempt_stops_and_takes_its_files_along(
    start: Start, store: JobStore, database: Database, backend: ScriptedBackend, stored: Callable[[], set[str]]
) -> None:
    backend.script = [HANG]
    async with start():
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(stored()))
        with database.transaction() as connection:
            elsewhere = {"attempt": 2, "dispatcher": "other", "lease_until": database.now_sql() + 60}
            connection.execute(sa.update(jobs).values(elsewhere))
        await until(lambda: not stored())
        assert [ref.attempt for ref in backend.cancelled] == [1]
        assert (now(store, job).status, now(store, job).attempt) == (JobStatus.PROCESSING, 2)


async def test_capacity_bounds_what_runs_at_once(start: Start, store: JobStore, backend: ScriptedBackend) -> None:
    backend.places = 2
    submitted = [store.submit(ALICE, make_spec()) for _ in range(7)]
    async with start("one"), start("two"):
        for job in submitted:
            assert (await end_of(store, job)).status is JobStatus.SUCCESS
    assert backend.most_at_once == 2
    assert sorted(ref.job_id for ref in backend.attempts) == sorted(job.id for job in submitted)


async def test_stopping_waits_for_what_runs_and_puts_back_the_rest(
    store: JobStore, objects: LocalStore, backend: ScriptedBackend
) -> None:
    backend.script = [HANG]
    backend.places = 1
    slow, waiting = (store.submit(ALICE, make_spec()) for _ in range(2))
    async with GuardedClient(LOCAL) as client:
        config = AppConfig(dispatcher=DispatcherConfig(poll_s=0.05, lease_s=1.0))
        dispatcher = Dispatcher(config, store, objects, backend, client, PrometheusMeter(), "one")
        loop = asyncio.create_task(dispatcher.run())
        await until(lambda: bool(backend.attempts))
        stopping = asyncio.create_task(dispatcher.stop(0.5))
        await asyncio.sleep(0.3)
        assert now(store, slow).status is JobStatus.PROCESSING
        await stopping
        await loop
    for job, attempt in ((slow, 1), (waiting, 0)):
        left = now(store, job)
        assert (left.status, left.attempt, left.charged, left.suspect) == (JobStatus.QUEUED, attempt, 0, False)
    assert store.claim("next", 2, 100, 60.0) != ()


async def test_stopping_lets_a_short_job_end(start: Start, store: JobStore, backend: ScriptedBackend) -> None:
    backend.script = [HANG]
    async with start() as dispatcher:
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(backend.attempts))
        stopping = asyncio.create_task(dispatcher.stop(10.0))
        await asyncio.sleep(0.1)
        later = store.submit(ALICE, make_spec())
        backend.go.set()
        await stopping
    assert now(store, job).status is JobStatus.SUCCESS
    assert now(store, later).status is JobStatus.QUEUED


async def test_left_over_inputs_are_swept(
    start: Start, store: JobStore, objects: LocalStore, stored: Callable[[], set[str]], png: bytes
) -> None:
    job = await submit(store, objects, ALICE, make_spec(), {"init_image": png})
    store.request_cancel(job.id)  # by a gateway, which does not clean up
    assert stored()
    async with start():
        await until(lambda: not stored())


async def test_pictures_of_a_temporary_job_go_after_a_day(
    start: Start, store: JobStore, database: Database, stored: Callable[[], set[str]]
) -> None:
    def pass_time(seconds: float) -> None:
        with database.transaction() as connection:
            connection.execute(sa.update(jobs).values(delete_at=jobs.c.delete_at - seconds))

    async with start(lease_s=0.3):
        kept, temporary = (store.submit(ALICE, make_spec(temp=temp)) for temp in (False, True))
        both = [(await end_of(store, job)).result for job in (kept, temporary)]
        files = [result.keys[0] for result in both if result is not None]
        pass_time(23.9 * 3600)
        await asyncio.sleep(0.5)
        assert {*files} <= stored()
        pass_time(0.2 * 3600)
        await until(lambda: files[1] not in stored())
        assert files[0] in stored()
        await until(lambda: store.pictures.expired() == ())
    assert now(store, temporary).status is JobStatus.SUCCESS
