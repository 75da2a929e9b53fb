"""Dispatchers in trouble: dead ones, poison, outages of the database, slow threads and stores."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from serve_app.config import AppConfig, LimitsConfig
from serve_app.database import Database
from serve_app.errors import WorkerLost
from serve_app.fetching import GuardedClient
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.job import Job, JobResult, JobStatus
from serve_app.jobs.store import JobStore
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from serve_app.tasks import AttemptRef, GenerationResult
from support.backend import HANG, ScriptedBackend
from support.dispatch import Start, end_of, now, running, until
from support.jobs import ALICE, make_spec
from support.postgres import new_database
from support.web import LOCAL


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
