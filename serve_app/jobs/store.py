"""JobStore: every statement on jobs. Knows SQL and the record; knows nothing of pictures, HTTP or asyncio.

A claim gives a job to one dispatcher for the length of a lease and raises its attempt number. Whatever is written
about an attempt names that number and changes nothing once another attempt has begun (a fencing token). All times are
by the database's clock. Every method blocks and is safe to use from many threads and processes.
"""

import math
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import sqlalchemy as sa

from serve_app.config import LimitsConfig
from serve_app.database import Database, jobs
from serve_app.errors import QueueFull
from serve_app.jobs.expressions import ENDED, AttemptKey, held_by, known_progress, waiting_line
from serve_app.jobs.inputs import JobInputs
from serve_app.jobs.job import Job, JobResult, JobSpec, JobStatus
from serve_app.jobs.outlook import Outlook, mean_run_s, outlook, queue_time_s
from serve_app.jobs.pictures import JobPictures
from serve_app.jobs.records import UNREADABLE, is_readable, read_job
from serve_app.keys import Principal

WEBHOOK_PENDING: Final = "pending"
NO_PROGRESS: Final[Mapping[AttemptKey, float]] = MappingProxyType({})

_ID_MIN: Final = 2**40
_ID_MAX: Final = 2**53  # JavaScript keeps 53 bits exactly
_QUEUE_LOCK, _CLAIM_LOCK = 1, 2
_RETRY_AFTER_MAX_S = 60
_WEBHOOK_STATUS_MAX = 200
_ERROR_MAX = 2000


@dataclass(frozen=True, slots=True)
class Holding:
    """What became of attempts that a dispatcher believes to hold."""

    lost: frozenset[AttemptKey]
    """The job ended or was given to another attempt."""
    cancel_requested: frozenset[AttemptKey]


class JobStore:
    def __init__(self, database: Database, limits: LimitsConfig) -> None:
        self._database = database
        self._limits = limits
        self.inputs = JobInputs(database)
        self.pictures = JobPictures(database)

    # Acceptance

    def submit(self, principal: Principal, spec: JobSpec, confirm: Callable[[], None] | None = None) -> Job:
        """Accept a job: from the commit on it ends as success, failed or cancelled.

        ``confirm`` is called before the commit, while nobody can delete a stored input that the spec names.

        Raises:
            QueueFull: a queue limit is met.
        """
        row: dict[str, Any] = {
            "id": _ID_MIN + secrets.randbelow(_ID_MAX - _ID_MIN),
            "tenant": principal.tenant,
            "key_id": principal.key_id,
            "status": JobStatus.QUEUED,
            "endpoint": spec.endpoint,
            "spec": spec.model_dump_json(),
            "file_prefix": spec.output.file_prefix,
            "created_at": self._database.now_sql(),
            "not_before": self._database.now_sql(),
            "attempt": 0,
            "charged": 0,
            "suspect": False,
            "cancel_requested": False,
            "webhook_status": WEBHOOK_PENDING if spec.webhook else None,
        }
        kept = {item.field: item.key for item in spec.inputs if item.key}
        with self._database.transaction() as connection:
            if kept:
                self.inputs.lock(connection)
            self._database.lock(connection, _QUEUE_LOCK)
            self._check_limits(connection, principal.tenant)
            job = read_job(connection.execute(sa.insert(jobs).values(row).returning(jobs)).one())
            if kept:
                self.inputs.add(connection, job.id, kept)
            if confirm is not None:
                confirm()
        return job

    def check_limits(self, tenant: str) -> None:
        """Raises QueueFull when a submit would; asked before inputs are stored in vain."""
        with self._database.read() as connection:
            self._check_limits(connection, tenant)

    def _check_limits(self, connection: sa.Connection, tenant: str) -> None:
        queued = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.QUEUED)
        limits = (
            ("queue_max", self._limits.queue_max, queued),
            ("queue_max_per_tenant", self._limits.queue_max_per_tenant, queued.where(jobs.c.tenant == tenant)),
        )
        for name, limit, count in limits:
            if limit is not None and connection.execute(count).scalar_one() >= limit:
                retry_after_s = math.ceil(mean_run_s(connection, None) or 1)
                raise QueueFull(
                    retry_after_s=min(max(1, retry_after_s), _RETRY_AFTER_MAX_S),
                    tip=f"The queue is full: {name} allows {limit} waiting jobs.",
                )

    # Reading

    def get(self, job_id: int) -> Job | None:
        return self._one(jobs.c.id == job_id)

    def find(self, file_prefix: str) -> Job | None:
        """The job whose pictures are named ``<file_prefix>-<n>.png``."""
        return self._one(jobs.c.file_prefix == file_prefix)

    def ended(self, job_ids: Collection[int]) -> dict[int, Job]:
        """Those of ``job_ids`` that have ended, by one query."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(jobs).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(ENDED)))
            return {row.id: read_job(row) for row in rows}

    def list(self, tenant: str, limit: int, before: int | None = None) -> tuple[Job, ...]:
        """A tenant's jobs, newest first; ``before``: id of the last job of the page before."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if before is not None:
            last = sa.select(jobs.c.created_at, jobs.c.id).where(jobs.c.id == before, jobs.c.tenant == tenant)
            query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < last.scalar_subquery())
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit)
        with self._database.read() as connection:
            return tuple(map(read_job, connection.execute(query)))

    def counts(self) -> dict[JobStatus, int]:
        """How many jobs are queued and how many are processing."""
        live = (JobStatus.QUEUED, JobStatus.PROCESSING)
        query = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.status.in_(live)).group_by(jobs.c.status)
        with self._database.read() as connection:
            found = {JobStatus(status): count for status, count in connection.execute(query)}
        return {status: found.get(status, 0) for status in live}

    def outlook(self, job_id: int) -> Outlook:
        """Where a job stands in the queue and when it may end."""
        with self._database.read() as connection:
            return outlook(connection, job_id, self._database.now_sql())

    def queue_time_s(self) -> float:
        """Seconds that a job submitted now is expected to wait."""
        with self._database.read() as connection:
            return queue_time_s(connection)

    # Attempts

    def claim(self, dispatcher: str, count: int, capacity: int, lease_s: float) -> tuple[Job, ...]:
        """Give up to ``count`` jobs to a dispatcher, while the whole cluster runs no more than ``capacity``.

        A job whose spec cannot be read ends as failed instead.

        At most one suspect runs in the whole cluster: were there two, one that kills the replica on which the other
        waits for its turn would put the blame on both.
        """
        line = waiting_line(jobs.c.not_before <= self._database.now_sql())
        running = sa.select(sa.func.count()).where(jobs.c.status == JobStatus.PROCESSING)
        processing = jobs.alias("processing")
        suspect_runs = sa.exists().where(processing.c.status == JobStatus.PROCESSING, processing.c.suspect)
        with self._database.transaction() as connection:
            self._database.lock(connection, _CLAIM_LOCK)
            free = min(count, capacity - connection.execute(running).scalar_one())
            if free <= 0:
                return ()
            chosen = connection.scalars(
                sa.select(jobs.c.id)
                .join(line, line.c.id == jobs.c.id)
                .where(
                    jobs.c.status == JobStatus.QUEUED,
                    sa.or_(sa.not_(line.c.suspect), sa.and_(line.c.place_of_kind == 1, sa.not_(suspect_runs))),
                )
                .order_by(line.c.place)
                .limit(free)
                .with_for_update(of=jobs, skip_locked=True)  # a row that is being cancelled is not waited for
            ).all()
            if not chosen:
                return ()
            now = self._database.now_sql()
            rows = connection.execute(
                sa.update(jobs)
                .where(jobs.c.id.in_(chosen))
                .values(
                    status=JobStatus.PROCESSING,
                    attempt=jobs.c.attempt + 1,
                    started_at=now,
                    dispatcher=dispatcher,
                    lease_until=now + lease_s,
                )
                .returning(jobs)
            ).all()
            claimed = {row.id: read_job(row) for row in rows if is_readable(row)}
            if unreadable := [row.id for row in rows if row.id not in claimed]:
                connection.execute(sa.update(jobs).where(jobs.c.id.in_(unreadable)).values(self._given_up(UNREADABLE)))
        return tuple(claimed[job_id] for job_id in chosen if job_id in claimed)

    def renew(
        self, held: Collection[AttemptKey], lease_s: float, progress: Mapping[AttemptKey, float] = NO_PROGRESS
    ) -> Holding:
        """Prolong the leases of ``held``, and write how far they are where that is known: one statement for all."""
        renewed = (
            sa.update(jobs)
            .where(held_by(*held))
            .values(lease_until=self._database.now_sql() + lease_s, progress=known_progress(progress))
            .returning(jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested)
        )
        with self._database.transaction() as connection:
            return _holding(held, {(row.id, row.attempt): row.cancel_requested for row in connection.execute(renewed)})

    def inspect(self, held: Collection[AttemptKey]) -> Holding:
        """What ``renew`` would say, without writing."""
        with self._database.read() as connection:
            query = sa.select(jobs.c.id, jobs.c.attempt, jobs.c.cancel_requested).where(held_by(*held))
            return _holding(held, {(row.id, row.attempt): row.cancel_requested for row in connection.execute(query)})

    def finish(self, job_id: int, attempt: int, result: JobResult, keep_s: float | None = None) -> bool:
        """End a job as success. False: the attempt no longer holds the job, nothing was written.

        ``keep_s``: seconds until its pictures are to be deleted; None: they stay.
        """
        delete_at = None if keep_s is None else self._database.now_sql() + keep_s
        return self._end(job_id, attempt, JobStatus.SUCCESS, result=result.model_dump_json(), delete_at=delete_at)

    def fail(self, job_id: int, attempt: int, message: str) -> bool:
        """End a job as failed; see ``finish``."""
        # PostgreSQL stores neither NUL nor half a surrogate pair.
        clean = message.replace("\x00", "").encode("utf-8", "replace").decode()[:_ERROR_MAX]
        return self._end(job_id, attempt, JobStatus.FAILED, error=clean)

    def cancel(self, job_id: int, attempt: int) -> bool:
        """End a job as cancelled; see ``finish``."""
        return self._end(job_id, attempt, JobStatus.CANCELLED)

    def release(
        self, job_id: int, attempt: int, *, suspect: bool, charged: int = 0, delay_s: float = 0.0
    ) -> JobStatus | None:
        """Put a job back to the queue for another attempt; it ends as cancelled if that was requested.

        ``charged`` is added to the attempts that count against the job. Returns the new status, None when the
        attempt no longer held the job.
        """
        with self._database.transaction() as connection:
            status = connection.scalar(
                sa.update(jobs)
                .where(held_by((job_id, attempt)))
                .values(
                    **self._requeued(),
                    not_before=self._database.now_sql() + delay_s,
                    suspect=suspect,
                    charged=jobs.c.charged + charged,
                )
                .returning(jobs.c.status)
            )
        return JobStatus(status) if status is not None else None

    def sweep(self, attempts_bound: int) -> tuple[Job, ...]:
        """Take back the jobs of dispatchers that died: their leases ran out. Returns them as they are now.

        A job ends as failed at ``attempts_bound`` attempts, whoever was to blame.
        """
        expired = sa.and_(jobs.c.status == JobStatus.PROCESSING, jobs.c.lease_until < self._database.now_sql())
        hopeless = sa.and_(jobs.c.attempt >= attempts_bound, sa.not_(jobs.c.cancel_requested))
        failed = self._given_up(f"The job was interrupted {attempts_bound} times.")
        with self._database.transaction() as connection:
            rows = [
                *connection.execute(sa.update(jobs).where(expired, hopeless).values(failed).returning(jobs)),
                *connection.execute(sa.update(jobs).where(expired).values(self._requeued()).returning(jobs)),
            ]
            return tuple(map(read_job, rows))

    def request_cancel(self, job_id: int) -> Job | None:
        """Cancel a queued job at once, ask for the end of a running one; one that has ended stays as it is.

        Returns the job as it is now, None for an unknown id.
        """
        queued = jobs.c.status == JobStatus.QUEUED
        with self._database.transaction() as connection:
            row = connection.execute(
                sa.update(jobs)
                .where(jobs.c.id == job_id, jobs.c.status.in_((JobStatus.QUEUED, JobStatus.PROCESSING)))
                .values(
                    status=sa.case((queued, JobStatus.CANCELLED), else_=jobs.c.status),
                    finished_at=sa.case((queued, self._database.now_sql())),
                    cancel_requested=True,
                )
                .returning(jobs)
            ).one_or_none()
        return read_job(row) if row is not None else self.get(job_id)

    def take_untold(self, age_s: float, lease_s: float, limit: int) -> tuple[Job, ...]:
        """Jobs that ended ``age_s`` ago or earlier and whose webhook nobody has recorded as sent or failed.

        Nobody else is given them for ``lease_s``: the lease of an ended job is that of its webhook.
        """
        now = self._database.now_sql()
        untold = sa.and_(
            jobs.c.webhook_status == WEBHOOK_PENDING,
            jobs.c.status.in_(ENDED),
            jobs.c.finished_at < now - age_s,
            sa.or_(jobs.c.lease_until.is_(None), jobs.c.lease_until < now),
        )
        some = sa.select(jobs.c.id).where(untold).order_by(jobs.c.finished_at).limit(limit)
        with self._database.read() as connection:
            if not (found := connection.scalars(some).all()):
                return ()
        # The condition again: another dispatcher may have taken some of them meanwhile.
        taken = sa.update(jobs).where(jobs.c.id.in_(found), untold).values(lease_until=now + lease_s).returning(jobs)
        with self._database.transaction() as connection:
            return tuple(map(read_job, connection.execute(taken)))

    def set_webhook_status(self, job_id: int, status: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(jobs).where(jobs.c.id == job_id).values(webhook_status=status[:_WEBHOOK_STATUS_MAX])
            )

    # Parts

    def _one(self, condition: sa.ColumnElement[bool]) -> Job | None:
        with self._database.read() as connection:
            row = connection.execute(sa.select(jobs).where(condition)).one_or_none()
        return read_job(row) if row is not None else None

    def _end(self, job_id: int, attempt: int, status: JobStatus, **values: object) -> bool:
        ended = (
            sa.update(jobs)
            .where(held_by((job_id, attempt)))
            .values(status=status, finished_at=self._database.now_sql(), dispatcher=None, lease_until=None, **values)
        )
        with self._database.transaction() as connection:
            return connection.execute(ended).rowcount == 1

    def _given_up(self, error: str) -> dict[str, Any]:
        """Column values that end a running job as failed."""
        return {
            "status": JobStatus.FAILED,
            "error": error,
            "finished_at": self._database.now_sql(),
            "dispatcher": None,
            "lease_until": None,
        }

    def _requeued(self) -> dict[str, Any]:
        """Column values that put a running job back, or end it if its cancellation was requested."""
        return {
            "status": sa.case((jobs.c.cancel_requested, JobStatus.CANCELLED), else_=JobStatus.QUEUED),
            "finished_at": sa.case((jobs.c.cancel_requested, self._database.now_sql())),
            "dispatcher": None,
            "lease_until": None,
            "progress": None,
        }


def _holding(held: Collection[AttemptKey], found: Mapping[AttemptKey, bool]) -> Holding:
    return Holding(frozenset(held) - found.keys(), frozenset(key for key, cancel in found.items() if cancel))
