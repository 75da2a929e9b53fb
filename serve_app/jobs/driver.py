"""Driver: takes one claimed job through one attempt, writes what came of it, cleans up behind it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from serve_app.database import OUTAGES
from serve_app.errors import Cancelled, JobError, RetryableError, ServeError
from serve_app.jobs.job import Job, JobResult, JobStatus
from serve_app.jobs.lifecycle import Workshop, attempt_ref, run_attempt
from serve_app.jobs.outbox import Outbox
from serve_app.jobs.retries import Again, GiveUp, after_loss
from serve_app.jobs.threads import StoreThreads
from serve_app.metrics import Meter
from serve_app.tasks import AttemptRef

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CANCEL_TIMEOUT_S = 5.0
_WRITE_AGAIN_S = 0.5
_TEMP_KEEP_S = 24 * 3600.0
"""How long the pictures of a job with ``temp: yes`` stay."""


class Interruption(Enum):
    """Why a running attempt is stopped from outside."""

    CANCELLED = auto()
    """Its owner asked for it."""
    LOST = auto()
    """The job was given to another attempt, or has ended."""
    RELEASED = auto()
    """This process stops; another will run the job again."""


@dataclass(slots=True)
class Running:
    """An attempt in progress."""

    job: Job
    interruption: Interruption | None = None
    """Set before the attempt's task is cancelled."""
    ending: bool = False
    """The attempt is over and its outcome is being written: too late for an interruption."""


Outcome = JobResult | GiveUp | Again | Interruption


class Driver:
    def __init__(
        self,
        shop: Workshop,
        threads: StoreThreads,
        outbox: Outbox,
        meter: Meter,
        *,
        attempt_timeout_s: float,
        max_attempts: int,
    ) -> None:
        self._shop = shop
        self._threads = threads
        self._outbox = outbox
        self._meter = meter
        self._attempt_timeout_s = attempt_timeout_s
        self._max_attempts = max_attempts

    async def drive(self, running: Running) -> None:
        """From the claim to the end of the attempt. The task may be cancelled after ``interruption`` is set."""
        outcome = await self._attempt(running)
        running.ending = True
        job = running.job
        ref = attempt_ref(job)
        if isinstance(outcome, Again):
            await self._release(job, outcome)
        elif outcome is Interruption.RELEASED:
            await self._release(job, Again(suspect=job.suspect, charged=0, delay_s=0.0))
        elif outcome is Interruption.LOST or not await self._ended_by_us(job, outcome):
            logger.info("job %d: attempt %d was overtaken", job.id, job.attempt)
            await self._delete_files(ref)
        else:
            await self.after_end(job.id)

    async def after_end(self, job_id: int) -> None:
        """What follows once a job has ended: files of other attempts and inputs go, its owner is told."""
        job = await self._write(lambda: self._shop.store.get(job_id))
        if job is None:
            return
        self._meter.count("jobs_ended", status=job.status)
        if job.finished_at is not None:
            self._meter.observe("job_seconds", job.finished_at - job.created_at, status=job.status)
        self._outbox.send(job)
        for attempt in range(1, job.attempt + 1):
            if attempt != job.attempt or job.status is not JobStatus.SUCCESS:
                await self._delete_files(AttemptRef(job_id=job.id, attempt=attempt))
        await self.drop_inputs(job.id)

    async def drop_inputs(self, job_id: int) -> None:
        """Delete the inputs of an ended job. What fails now is tried again by the next sweep."""
        try:
            await asyncio.to_thread(self._shop.store.inputs.drop, job_id, self._shop.objects.delete)
        except (OSError, SQLAlchemyError):
            logger.warning("job %d: inputs are not deleted yet", job_id, exc_info=True)

    async def drop_pictures(self, job_id: int, attempt: int) -> None:
        """Delete the pictures of a job that has had its time. What fails now is tried again by the next sweep."""
        try:
            await asyncio.to_thread(self._shop.objects.delete_prefix, AttemptRef(job_id=job_id, attempt=attempt).name)
        except OSError:
            logger.warning("job %d: pictures are not deleted yet", job_id, exc_info=True)
        else:
            await self._threads.run(self._shop.store.pictures.deleted, job_id)

    async def _attempt(self, running: Running) -> Outcome:  # noqa: PLR0911  - one for each way an attempt ends
        job = running.job
        try:
            async with asyncio.timeout(self._attempt_timeout_s):
                return await run_attempt(self._shop, job)
        except Cancelled:
            return Interruption.CANCELLED
        except JobError as error:
            return GiveUp(error.message)
        except SQLAlchemyError as error:
            return self._judge(job, RetryableError("The database could not be used."), error)
        except RetryableError as error:
            return self._judge(job, error, error)
        except TimeoutError as error:
            await self._stop_backend(attempt_ref(job))
            return self._judge(job, error, error)
        except asyncio.CancelledError:
            await self._stop_backend(attempt_ref(job))
            return running.interruption or Interruption.RELEASED
        except Exception:
            logger.exception("job %d: attempt %d failed in an unforeseen way", job.id, job.attempt)
            return GiveUp("Internal server error")

    def _judge(self, job: Job, error: RetryableError | TimeoutError, cause: Exception) -> Again | GiveUp:
        verdict = after_loss(job, error, self._max_attempts)
        logger.warning("job %d: attempt %d was lost (%r): %r", job.id, job.attempt, cause, verdict)
        reason = error.code if isinstance(error, RetryableError) else "timeout"
        if isinstance(verdict, Again):
            self._meter.count("jobs_retried", reason=reason)
        return verdict

    async def _ended_by_us(self, job: Job, outcome: JobResult | GiveUp | Interruption) -> bool:
        if await self._write(lambda: self._end(job, outcome)):
            return True
        # A commit whose answer was lost looks like this too; only the attempt itself can have written its success.
        found = await self._write(lambda: self._shop.store.get(job.id))
        return found is not None and (found.status, found.attempt) == (JobStatus.SUCCESS, job.attempt)

    def _end(self, job: Job, outcome: JobResult | GiveUp | Interruption) -> bool:
        store = self._shop.store
        if isinstance(outcome, JobResult):
            return store.finish(job.id, job.attempt, outcome, _TEMP_KEEP_S if job.spec.temp else None)
        if isinstance(outcome, GiveUp):
            return store.fail(job.id, job.attempt, outcome.message)
        return store.cancel(job.id, job.attempt)

    async def _release(self, job: Job, again: Again) -> None:
        status = await self._write(
            lambda: self._shop.store.release(
                job.id, job.attempt, suspect=again.suspect, charged=again.charged, delay_s=again.delay_s
            )
        )
        await self._delete_files(attempt_ref(job))
        if status is JobStatus.CANCELLED:
            await self.after_end(job.id)

    async def _write(self, write: Callable[[], T]) -> T:
        """Until the database has answered. The lease is renewed meanwhile, or another attempt has overtaken us."""
        while True:
            try:
                return await self._threads.run(write)
            except OUTAGES:
                logger.warning("the database is away; trying again", exc_info=True)
                await asyncio.sleep(_WRITE_AGAIN_S)

    async def _stop_backend(self, ref: AttemptRef) -> None:
        try:
            async with asyncio.timeout(_CANCEL_TIMEOUT_S):
                await self._shop.backend.cancel(ref)
        except (ServeError, TimeoutError):
            logger.warning("%s could not be stopped; it runs on for nothing", ref.name, exc_info=True)

    async def _delete_files(self, ref: AttemptRef) -> None:
        try:
            await asyncio.to_thread(self._shop.objects.delete_prefix, ref.name)
        except OSError:
            logger.warning("files of %s stay in the store", ref.name, exc_info=True)
