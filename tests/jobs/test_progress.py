"""How far a job is: written with its lease, shown while it runs, forgotten with its attempt."""

import asyncio

import sqlalchemy as sa

from serve_app.config import LimitsConfig
from serve_app.database import Database
from serve_app.errors import WorkerBusy
from serve_app.jobs.answers import fetch_body
from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.outlook import Outlook
from serve_app.jobs.store import JobStore
from support.backend import HANG, ScriptedBackend
from support.dispatch import Start, end_of, now, until
from support.jobs import ALICE, RESULT, make_spec


def claimed(store: JobStore, count: int = 1) -> tuple[Job, ...]:
    return store.claim("one", count, 1000, 60.0)


def test_renewing_writes_each_jobs_own_progress_in_one_statement(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    for _ in range(3):
        store.submit(ALICE, make_spec())
    first, second, third = claimed(store, 3)
    held = [(job.id, job.attempt) for job in (first, second, third)]
    statements: list[str] = []
    sa.event.listen(any_database.engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    store.renew(held, 60.0, {held[0]: 0.25, held[1]: 0.5})
    updates = [statement for statement in statements if statement.startswith("UPDATE")]
    assert len(updates) == 1
    assert [now(store, job).progress for job in (first, second, third)] == [0.25, 0.5, None]
    store.renew(held, 60.0)
    store.renew(held, 60.0, {held[0]: 0.75})
    assert [now(store, job).progress for job in (first, second, third)] == [0.75, 0.5, None]


def test_an_old_attempts_progress_never_shows(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    (old,) = claimed(any_store)
    any_store.renew([(old.id, old.attempt)], 60.0, {(old.id, old.attempt): 0.9})
    any_store.release(old.id, old.attempt, suspect=False)
    assert now(any_store, job).progress is None
    (new,) = claimed(any_store)
    assert new.progress is None
    # The dispatcher holds both for a moment, and the old one is still heard of.
    both = [(old.id, old.attempt), (new.id, new.attempt)]
    any_store.renew(both, 60.0, {both[0]: 0.95})
    assert now(any_store, job).progress is None
    any_store.renew(both, 60.0, {both[0]: 0.95, both[1]: 0.1})
    assert now(any_store, job).progress == 0.1


def test_a_job_whose_dispatcher_died_starts_from_nothing(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    (lost,) = any_store.claim("dead", 1, 1000, -1.0)
    key = (lost.id, lost.attempt)
    any_store.renew([key], -1.0, {key: 0.6})
    assert [swept.progress for swept in any_store.sweep(50)] == [None]
    assert now(any_store, job).progress is None


def test_an_ended_job_takes_no_more_progress(any_store: JobStore) -> None:
    job = any_store.submit(ALICE, make_spec())
    (run,) = claimed(any_store)
    key = (run.id, run.attempt)
    any_store.renew([key], 60.0, {key: 0.8})
    any_store.finish(run.id, run.attempt, RESULT)
    assert any_store.renew([key], 60.0, {key: 0.9}).lost == {key}
    assert now(any_store, job).progress == 0.8


def test_fetch_tells_progress_while_the_job_waits_and_runs(store: JobStore) -> None:
    job = store.submit(ALICE, make_spec())
    assert fetch_body(job, "http://h", Outlook(1, 5))["progress"] == 0.0
    running = job.model_copy(update={"status": JobStatus.PROCESSING, "progress": 1 / 3})
    assert fetch_body(running, "http://h", Outlook(0, 5))["progress"] == 0.333


async def test_a_dispatcher_writes_what_the_backend_tells(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    """The second attempt's share is lower, and is what shows."""
    backend.script = [HANG]
    backend.shares = [0.7]
    async with start(lease_s=0.3):
        job = store.submit(ALICE, make_spec())
        await until(lambda: now(store, job).progress == 0.7)
        backend.script = [WorkerBusy(), HANG]
        other = store.submit(ALICE, make_spec())
        await until(lambda: now(store, other).attempt == 2)
        assert now(store, other).progress is None
        backend.shares = [0.7, 0.2]
        await until(lambda: now(store, other).progress == 0.2)
        assert now(store, job).progress == 0.7
        backend.go.set()
        assert (await end_of(store, other)).attempt == 2


async def test_a_backend_that_does_not_answer_delays_no_lease(
    start: Start, store: JobStore, backend: ScriptedBackend
) -> None:
    backend.script, backend.mute = [HANG], True
    async with start(lease_s=0.6):
        job = store.submit(ALICE, make_spec())
        await until(lambda: bool(backend.attempts))
        await asyncio.sleep(1.2)
        assert store.sweep(50) == ()
        assert now(store, job).progress is None
        backend.go.set()
        assert (await end_of(store, job)).attempt == 1
