"""Dispatchers at work: success, loss, poison, cancellation, outages, restarts, shutdown, webhooks."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
import sqlalchemy as sa
from PIL import Image
from prometheus_client import CollectorRegistry
from support.backend import HANG, ScriptedBackend
from support.jobs import ALICE, make_spec
from support.postgres import new_database
from support.web import LOCAL, WebServer, web_server

from serve_app.config import AppConfig, DispatcherConfig, LimitsConfig, WebhookConfig
from serve_app.database import Database, jobs
from serve_app.errors import Cancelled, JobError, OutOfMemory, UnknownModel, WorkerBusy, WorkerLost
from serve_app.fetching import GuardedClient
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.job import Job, JobResult, JobSpec, JobStatus
from serve_app.jobs.lifecycle import JobWaiter, submit
from serve_app.jobs.store import JobStore
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from serve_app.tasks import AttemptRef, GenerationResult
from serve_app.webhooks import secret_bytes, signature

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Start(Protocol):
    """Runs a dispatcher on the test's store; ``settings`` are those of ``DispatcherConfig``."""

    def __call__(self, name: str = ..., **settings: float) -> AbstractAsyncContextManager[Dispatcher]: ...


@pytest.fixture
def backend(objects: LocalStore) -> ScriptedBackend:
    return ScriptedBackend(objects)


@pytest.fixture
async def web() -> AsyncIterator[WebServer]:
    async with web_server() as web:
        yield web


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def start(store: JobStore, objects: LocalStore, backend: ScriptedBackend, registry: CollectorRegistry) -> Start:
    meter = PrometheusMeter(registry)

    @asynccontextmanager
    async def start(name: str = "one", **settings: float) -> AsyncIterator[Dispatcher]:
        async with running(store, objects, backend, meter, name, **settings) as dispatcher:
            yield dispatcher

    return start


@asynccontextmanager
async def running(
    store: JobStore,
    objects: LocalStore,
    backend: ScriptedBackend,
    meter: PrometheusMeter,
    name: str,
    **settings: float,
) -> AsyncIterator[Dispatcher]:
    options = {"poll_s": 0.05, "lease_s": 1.0} | settings
    config = AppConfig(
        dispatcher=DispatcherConfig.model_validate(options),
        webhooks=WebhookConfig(timeout_s=2.0, secret_env="WEBHOOK_SECRET"),
    )
    async with GuardedClient(LOCAL) as client:
        dispatcher = Dispatcher(config, store, objects, backend, client, meter, name)
        loop = asyncio.create_task(dispatcher.run())
        try:
            yield dispatcher
        finally:
            await dispatcher.stop(5.0)
            await loop


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    return (tmp_path / "a.png").read_bytes()


async def end_of(store: JobStore, job: Job, timeout_s: float = 15.0) -> Job:
    ended = await JobWaiter(store, tick_s=0.02).wait(job.id, timeout_s)
    assert ended.status.ended, ended.status
    return ended


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        await asyncio.sleep(0.02)


def now(store: JobStore, job: Job) -> Job:
    found = store.get(job.id)
    assert found is not None
    return found


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


class SharedReplica(ScriptedBackend):
    """One replica that holds all jobs, and dies with all of them when the job ``poison`` is drawn.

    A job that shall run alone waits there until the replica has nothing else to draw.
    """

    def __init__(self, objects: LocalStore) -> None:
        super().__init__(objects)
        self.poison = 0
        self._engine = asyncio.Lock()
        self._died = asyncio.Event()

    async def generate(self, ref: AttemptRef, *args: Any, **more: Any) -> GenerationResult:
        death = asyncio.create_task(self._died.wait())
        drawing = asyncio.create_task(self._draw(ref, *args, **more))
        await asyncio.wait([death, drawing], return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            drawing.cancel()
            raise WorkerLost
        death.cancel()
        return drawing.result()

    async def _draw(self, ref: AttemptRef, *args: Any, **more: Any) -> GenerationResult:
        async with self._engine:
            await asyncio.sleep(0.05)
            if ref.job_id == self.poison:
                dead, self._died = self._died, asyncio.Event()
                dead.set()
                await asyncio.sleep(10)
            return await super().generate(ref, *args, **more)


async def test_only_the_poison_among_suspects_fails(any_store: JobStore, objects: LocalStore) -> None:
    backend = SharedReplica(objects)
    submitted = [any_store.submit(ALICE, make_spec()) for _ in range(8)]
    backend.poison = submitted[0].id
    meter = PrometheusMeter(CollectorRegistry())
    async with (
        running(any_store, objects, backend, meter, "one", max_attempts=3, lease_s=5.0),
        running(any_store, objects, backend, meter, "two", max_attempts=3, lease_s=5.0),
    ):
        poison, *innocent = [await end_of(any_store, job, 30.0) for job in submitted]
    assert (poison.status, poison.charged) == (JobStatus.FAILED, 1)
    assert {(job.status, job.charged) for job in innocent} == {(JobStatus.SUCCESS, 0)}
    assert any(job.suspect for job in innocent)


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


async def test_a_new_dispatcher_finds_the_jobs_of_a_dead_one(start: Start, store: JobStore) -> None:
    orphans = [store.submit(ALICE, make_spec()) for _ in range(3)]
    store.claim("dead", 2, 100, 0.3)
    async with start("new"):
        ended = [await end_of(store, job) for job in orphans]
    assert [job.status for job in ended] == [JobStatus.SUCCESS] * 3
    assert sorted(job.attempt for job in ended) == [1, 2, 2]
    assert {job.charged for job in ended} == {0}


async def test_a_lease_lasts_as_long_as_its_dispatcher_lives(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    backend.script = [HANG]
    async with start("one", lease_s=0.6), start("two", lease_s=0.6):
        job = store.submit(ALICE, make_spec())
        await asyncio.sleep(2.0)
        backend.go.set()
        assert (await end_of(store, job)).attempt == 1


async def test_a_lease_is_renewed_while_all_other_threads_are_busy(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    backend.script = [HANG]
    release = threading.Event()
    async with start(lease_s=0.6):
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(backend.attempts))
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, release.wait)
        await asyncio.sleep(1.5)
        swept = store.sweep(50)
        release.set()
        await busy
        backend.go.set()
        assert swept == ()
        assert (await end_of(store, job)).attempt == 1


class SlowDeletes(LocalStore):
    def delete_prefix(self, prefix: str) -> None:
        time.sleep(2.0)
        super().delete_prefix(prefix)


async def test_a_lease_is_renewed_while_the_sweep_deletes(store: JobStore, tmp_path: Path) -> None:
    objects = SlowDeletes(tmp_path / "slow")
    backend = ScriptedBackend(objects, script=[HANG])
    orphan = store.submit(ALICE, make_spec())
    store.claim("dead", 1, 100, 0.01)
    store.request_cancel(orphan.id)
    await asyncio.sleep(0.05)
    async with running(store, objects, backend, PrometheusMeter(CollectorRegistry()), "one", lease_s=0.6):
        job = store.submit(ALICE, make_spec())
        await until(lambda: now(store, orphan).status is JobStatus.CANCELLED)
        await until(lambda: bool(backend.attempts))
        await asyncio.sleep(1.2)
        swept = store.sweep(50)
        backend.go.set()
        assert swept == ()
        assert (await end_of(store, job)).attempt == 1


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


class SlowClaims(JobStore):
    claiming = False

    def claim(self, dispatcher: str, count: int, capacity: int, lease_s: float) -> tuple[Job, ...]:
        claimed = super().claim(dispatcher, count, capacity, lease_s)
        self.claiming = True
        time.sleep(0.4)
        return claimed


@pytest.mark.parametrize(("drain_s", "status"), [(10.0, JobStatus.SUCCESS), (0.1, JobStatus.QUEUED)])
async def test_a_job_claimed_during_the_stop_does_not_outlive_it(
    database: Database, objects: LocalStore, backend: ScriptedBackend, drain_s: float, status: JobStatus
) -> None:
    store = SlowClaims(database, LimitsConfig())
    job = store.submit(ALICE, make_spec())
    if status is JobStatus.QUEUED:
        backend.script = [HANG]
    async with GuardedClient(LOCAL) as client:
        dispatcher = Dispatcher(AppConfig(), store, objects, backend, client, PrometheusMeter(), "one")
        loop = asyncio.create_task(dispatcher.run())
        await until(lambda: store.claiming)
        await dispatcher.stop(drain_s)
        await loop
        assert (now(store, job).status, now(store, job).charged) == (status, 0)


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


async def test_an_outage_of_the_database_ends_neither_the_loop_nor_a_job(
    postgres_url: str, objects: LocalStore, backend: ScriptedBackend
) -> None:
    url = new_database(postgres_url)
    database = Database(url)
    database.migrate()
    store = JobStore(database, LimitsConfig())
    name = sa.make_url(url).database
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    backend.script = [HANG]
    async with running(store, objects, backend, PrometheusMeter(), "one", lease_s=5.0):
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(backend.attempts))
        with server.connect() as admin:
            admin.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            admin.execute(
                sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )
            backend.go.set()  # the picture is done while nobody can be told
            await asyncio.sleep(1.0)
            admin.execute(sa.text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))
        ended = await end_of(store, job)
        assert (ended.status, ended.attempt) == (JobStatus.SUCCESS, 1)
        assert (await end_of(store, store.submit(ALICE, make_spec()))).status is JobStatus.SUCCESS
    server.dispose()
    database.close()


async def test_a_failover_that_reads_only_for_a_while_is_waited_out(
    postgres_url: str, objects: LocalStore, backend: ScriptedBackend
) -> None:
    database = Database(new_database(postgres_url), pool_size=2)
    database.migrate()
    store = JobStore(database, LimitsConfig())
    backend.script = [HANG]
    async with running(store, objects, backend, PrometheusMeter(), "one", lease_s=5.0):
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(backend.attempts))
        await asyncio.to_thread(set_read_only, database, postgres_url, "on")
        backend.go.set()
        await asyncio.sleep(1.0)
        assert now(store, job).status is JobStatus.PROCESSING
        await asyncio.to_thread(set_read_only, database, postgres_url, "off")
        ended = await end_of(store, job)
        assert (ended.status, ended.attempt) == (JobStatus.SUCCESS, 1)
    database.close()


def set_read_only(database: Database, postgres_url: str, value: str) -> None:
    """As a standby is until it is promoted; running connections are cut."""
    name = database.engine.url.database
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as admin:
        admin.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = {value}"))
        admin.execute(
            sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
        )
    server.dispose()


class LostAnswers(JobStore):
    """The first ``finish`` is committed, then the connection breaks before the answer comes."""

    finished = 0

    def finish(self, job_id: int, attempt: int, result: JobResult, keep_s: float | None = None) -> bool:
        written = super().finish(job_id, attempt, result, keep_s)
        self.finished += 1
        if self.finished == 1:
            raise sa.exc.OperationalError("COMMIT", None, ConnectionResetError())
        return written


async def test_a_commit_whose_answer_was_lost_keeps_the_pictures(
    database: Database, objects: LocalStore, backend: ScriptedBackend, registry: CollectorRegistry
) -> None:
    store = LostAnswers(database, LimitsConfig())
    async with running(store, objects, backend, PrometheusMeter(registry), "one"):
        job = store.submit(ALICE, make_spec())
        await until(lambda: store.finished == 2)
    ended = now(store, job)
    assert ended.status is JobStatus.SUCCESS
    assert ended.result is not None
    assert objects.get(ended.result.keys[0]) == b"picture"
    assert registry.get_sample_value("controlnet_jobs_ended_total", {"status": "success"}) == 1


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


def hooked(web: WebServer) -> JobSpec:
    return make_spec(webhook=f"{web.url}/hook")


async def test_a_webhook_tells_the_end_once_and_signed(start: Start, store: JobStore, web: WebServer) -> None:
    async with start():
        job = store.submit(ALICE, hooked(web))
        await end_of(store, job)
        await until(lambda: now(store, job).webhook_status == "delivered")
    ((line, headers, body),) = web.requests
    assert line.startswith("POST /hook ")
    assert headers["webhook-id"] == f"msg_{job.id}"
    timestamp = int(headers["webhook-timestamp"])
    assert headers["webhook-signature"] == signature(secret_bytes(SECRET), f"msg_{job.id}", timestamp, body)
    told = json.loads(body)
    assert (told["status"], told["id"], told["track_id"]) == ("success", job.id, "order-1")


async def test_a_failure_is_told_too(start: Start, store: JobStore, web: WebServer, backend: ScriptedBackend) -> None:
    backend.script = [JobError("impossible")]
    async with start():
        job = store.submit(ALICE, hooked(web))
        await until(lambda: bool(web.requests))
    told = json.loads(web.requests[0][2])
    assert told == {"status": "failed", "id": job.id, "message": "impossible", "track_id": "order-1"}


async def test_a_webhook_that_nobody_sent_is_sent_by_the_sweep(
    start: Start, store: JobStore, database: Database, web: WebServer
) -> None:
    """Its dispatcher died after the end of the job, or the job was cancelled while it waited."""
    job = store.submit(ALICE, hooked(web))
    store.request_cancel(job.id)
    with database.transaction() as connection:
        connection.execute(sa.update(jobs).values(finished_at=jobs.c.finished_at - 120))
    async with start():
        await until(lambda: now(store, job).webhook_status == "delivered")
    assert [json.loads(body)["message"] for _, _, body in web.requests] == ["The job was cancelled."]


async def test_a_webhook_of_a_job_nobody_can_read_is_recorded_as_failed(
    start: Start, store: JobStore, database: Database, web: WebServer
) -> None:
    job = store.submit(ALICE, hooked(web))
    store.request_cancel(job.id)
    with database.transaction() as connection:
        connection.execute(sa.update(jobs).values(finished_at=jobs.c.finished_at - 120, spec="{}"))
    async with start():
        await until(lambda: (now(store, job).webhook_status or "").startswith("failed"))
    assert web.requests == []


async def test_a_webhook_in_trouble_neither_delays_nor_fails_the_job(
    start: Start, store: JobStore, web: WebServer
) -> None:
    web.status, web.delay_s = 500, 0.5
    async with start():
        job, refused = store.submit(ALICE, hooked(web)), store.submit(ALICE, make_spec(webhook="http://10.0.0.1/"))
        for waiting in (job, refused):
            ended = await end_of(store, waiting)
            assert ended.status is JobStatus.SUCCESS
        assert now(store, job).webhook_status == "pending"
        await until(lambda: now(store, job).webhook_status == "failed: HTTP 500")
        await until(lambda: now(store, refused).webhook_status == "failed: the address could not be reached")
