"""When jobs may end, by how long those before them ran."""

import math
from dataclasses import dataclass

import sqlalchemy as sa

from serve_app.database import jobs
from serve_app.jobs.expressions import waiting_line
from serve_app.jobs.job import JobStatus

_RECENT_JOBS = 20
_LOOKED_THROUGH = 400
_ASSUMED_RUN_S = 5.0  # before any job has ended


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a waiting client is told."""

    position: int
    """Place in the queue, from 1; 0 when the job runs or has ended."""
    eta_s: int
    """Estimated seconds to the end, at least 1."""


def outlook(connection: sa.Connection, job_id: int, now: sa.ColumnElement[float]) -> Outlook:
    """Where a job stands in the queue and when it may end. ``now``: the database's clock."""
    line = waiting_line()
    own = sa.select(jobs.c.status, jobs.c.endpoint, (now - jobs.c.started_at).label("elapsed_s"))
    job = connection.execute(own.where(jobs.c.id == job_id)).one()
    position = connection.scalar(sa.select(line.c.place).where(line.c.id == job_id)) or 0
    eta_s = _run_s(connection, job.endpoint, _ASSUMED_RUN_S)
    if position:
        until = sa.select(line.c.endpoint, sa.func.count()).where(line.c.place <= position)
        eta_s += _work_s(connection, until.group_by(line.c.endpoint), _ASSUMED_RUN_S) / _running(connection)
    elif job.status == JobStatus.PROCESSING:
        eta_s -= job.elapsed_s
    return Outlook(position, max(1, math.ceil(eta_s)))


def queue_time_s(connection: sa.Connection) -> float:
    """Seconds that a job submitted now is expected to wait; endpoints none of whose jobs has run yet count nothing."""
    queued = sa.select(jobs.c.endpoint, sa.func.count()).where(jobs.c.status == JobStatus.QUEUED)
    return _work_s(connection, queued.group_by(jobs.c.endpoint), 0.0) / _running(connection)


def mean_run_s(connection: sa.Connection, endpoint: str | None) -> float | None:
    """Mean seconds that recent successful jobs of this endpoint ran, None: of any. None where there are none.

    Apart, because a control map alone takes a fraction of a second, and a drawing minutes on a CPU.
    """
    run_s = (jobs.c.finished_at - jobs.c.started_at).label("run_s")
    recent = (
        sa.select(run_s, jobs.c.endpoint, jobs.c.not_before, jobs.c.created_at)
        .where(jobs.c.status == JobStatus.SUCCESS)
        .order_by(*_newest_first(jobs))
        .limit(_LOOKED_THROUGH)
        .subquery("recent")
    )
    own = sa.true() if endpoint is None else recent.c.endpoint == endpoint
    latest = (
        sa.select(recent.c.run_s).where(own).order_by(*_newest_first(recent)).limit(_RECENT_JOBS).subquery("latest")
    )
    return connection.scalar(sa.select(sa.func.avg(latest.c.run_s, type_=sa.Double)))


def _newest_first(table: sa.FromClause) -> tuple[sa.ColumnElement[float], ...]:
    """As the index on status is sorted."""
    return table.c.not_before.desc(), table.c.created_at.desc()


def _work_s(connection: sa.Connection, counts: sa.Select[str, int], assumed_s: float) -> float:
    """Seconds that so many jobs of each endpoint run one after another; ``assumed_s`` where none has run yet."""
    rows = connection.execute(counts).all()
    return sum(count * _run_s(connection, endpoint, assumed_s) for endpoint, count in rows)


def _run_s(connection: sa.Connection, endpoint: str, assumed_s: float) -> float:
    mean_s = mean_run_s(connection, endpoint)
    return assumed_s if mean_s is None else mean_s


def _running(connection: sa.Connection) -> int:
    """How many jobs run, at least 1: who divides by it asks how long others take."""
    running = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.PROCESSING)
    return max(1, connection.execute(running).scalar_one())
