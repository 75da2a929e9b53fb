"""When jobs are said to end: by jobs of the same endpoint, which take about the same time."""

import pytest
import sqlalchemy as sa

from serve_app.config import LimitsConfig
from serve_app.database import Database, jobs
from serve_app.jobs.job import Job, JobSpec
from serve_app.jobs.outlook import mean_run_s
from serve_app.jobs.store import JobStore
from support.jobs import ALICE, RESULT, make_spec


def as_maps() -> JobSpec:
    return make_spec().model_copy(update={"endpoint": "annotate"})


def claim_one(store: JobStore) -> Job:
    (job,) = store.claim("one", 1, 100, 60.0)
    return job


def mean_s(database: Database, endpoint: str) -> float | None:
    with database.read() as connection:
        return mean_run_s(connection, endpoint)


def test_the_outlook_learns_from_recent_jobs(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    assert mean_s(any_database, "controlnet") is None
    store.submit(ALICE, make_spec())
    assert store.queue_time_s() == 0
    done = ran(any_database, store, 30)
    assert mean_s(any_database, "controlnet") == pytest.approx(30, abs=0.1)
    waiting = store.submit(ALICE, make_spec())
    assert store.outlook(waiting.id).eta_s == 60
    claim_one(store)
    running = store.outlook(waiting.id)
    assert running.position == 0
    assert 28 <= running.eta_s <= 30
    assert store.outlook(done.id).eta_s >= 1


def test_the_outlook_of_a_drawing_is_not_that_of_a_map(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    store.submit(ALICE, make_spec())
    ran(any_database, store, 30)
    for _ in range(25):
        store.submit(ALICE, as_maps())
        ran(any_database, store, 0.5)
    assert mean_s(any_database, "controlnet") == pytest.approx(30, abs=0.1)
    assert mean_s(any_database, "annotate") == pytest.approx(0.5, abs=0.1)
    alone = store.submit(ALICE, as_maps())
    assert store.outlook(alone.id).eta_s == 1
    drawing = store.submit(ALICE, make_spec())
    assert store.outlook(drawing.id).eta_s == 61  # two wait: a map and the drawing itself, which then runs
    behind = store.submit(ALICE, as_maps())
    assert store.outlook(behind.id).eta_s == 32
    assert store.queue_time_s() == pytest.approx(31, abs=0.1)


def test_jobs_that_take_no_time_are_no_jobs_that_nobody_knows(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    store.submit(ALICE, as_maps())
    ran(any_database, store, 0)
    assert mean_s(any_database, "annotate") == 0
    for _ in range(3):
        waiting = store.submit(ALICE, as_maps())
    assert store.outlook(waiting.id).eta_s == 1


def ran(database: Database, store: JobStore, seconds: float) -> Job:
    """Let the one job that waits succeed, after so many seconds."""
    job = claim_one(store)
    store.finish(job.id, job.attempt, RESULT)
    with database.transaction() as connection:
        own = sa.update(jobs).where(jobs.c.id == job.id)
        connection.execute(own.values(started_at=jobs.c.finished_at - seconds))
    return job


def test_jobs_of_an_older_version_get_their_endpoint(any_database: Database) -> None:
    store = JobStore(any_database, LimitsConfig())
    accepted = {store.submit(ALICE, spec).id: spec.endpoint for spec in (make_spec(), as_maps(), make_spec())}
    with any_database.transaction() as connection:
        connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN endpoint"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0006'"))
    any_database.migrate()
    with any_database.read() as connection:
        found = connection.execute(sa.select(jobs.c.id, jobs.c.endpoint)).all()
    assert {row.id: row.endpoint for row in found} == accepted
