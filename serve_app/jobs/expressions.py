"""SQL expressions on the jobs table that have a meaning of their own."""

from collections.abc import Mapping

import sqlalchemy as sa

from serve_app.database import jobs
from serve_app.jobs.job import JobStatus

ENDED = tuple(status for status in JobStatus if status.ended)

AttemptKey = tuple[int, int]
"""Job id and attempt number."""


def held_by(*attempts: AttemptKey) -> sa.ColumnElement[bool]:
    """Jobs that these attempts still hold: the fence before every write."""
    pairs = sa.tuple_(jobs.c.id, jobs.c.attempt).in_(attempts)
    return sa.and_(jobs.c.id.in_([job_id for job_id, _ in attempts]), pairs, jobs.c.status == JobStatus.PROCESSING)


def known_progress(progress: Mapping[AttemptKey, float]) -> sa.ColumnElement[float | None]:
    """The progress of each of these attempts in its own row; other rows keep theirs."""
    if not progress:
        return jobs.c.progress
    # Named by its attempt too: of one job an old attempt may be reported beside the one that holds it now.
    rows = [
        (sa.and_(jobs.c.id == job_id, jobs.c.attempt == attempt), share)
        for (job_id, attempt), share in progress.items()
    ]
    return sa.case(*rows, else_=jobs.c.progress)


def waiting_line(*conditions: sa.ColumnElement[bool]) -> sa.Subquery:
    """Queued jobs that meet ``conditions``: ``id``; ``endpoint``; ``suspect``; ``place``, from 1 for the next job to
    run; and ``place_of_kind``, the place among suspects or among all others.

    Turns between tenants are fair: a tenant's n-th waiting job has turn n plus the number of jobs the tenant has
    running already. Lower turns go first, the older job within a turn: a tenant alone gets everything, two share
    evenly, and a long queue of one delays nobody else.
    """
    running = (
        sa.select(jobs.c.tenant, sa.func.count().label("count"))
        .where(jobs.c.status == JobStatus.PROCESSING)
        .group_by(jobs.c.tenant)
        .subquery("running")
    )
    own_place = sa.func.row_number().over(partition_by=jobs.c.tenant, order_by=[jobs.c.created_at, jobs.c.id])
    turns = (
        sa.select(
            jobs.c.id,
            jobs.c.created_at,
            jobs.c.suspect,
            jobs.c.endpoint,
            (own_place + sa.func.coalesce(running.c.count, 0)).label("turn"),
        )
        .outerjoin(running, running.c.tenant == jobs.c.tenant)
        .where(jobs.c.status == JobStatus.QUEUED, *conditions)
        .subquery("turns")
    )
    order = [turns.c.turn, turns.c.created_at, turns.c.id]
    place = sa.func.row_number().over(order_by=order)
    place_of_kind = sa.func.row_number().over(partition_by=turns.c.suspect, order_by=order)
    return sa.select(
        turns.c.id,
        turns.c.suspect,
        turns.c.endpoint,
        place.label("place"),
        place_of_kind.label("place_of_kind"),
    ).subquery("line")
