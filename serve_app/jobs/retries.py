"""What follows from a lost attempt: another one, or the end of the job. Arithmetic only."""

from dataclasses import dataclass
from typing import Final

from serve_app.errors import OutOfMemory, RetryableError, WorkerLost
from serve_app.jobs.job import Job

ATTEMPTS_BOUND: Final = 50
"""Attempts of one job, whoever was to blame: nothing loops for ever."""

_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 30.0


@dataclass(frozen=True, slots=True)
class Again:
    """Run the job again."""

    suspect: bool
    """Its next attempt runs alone."""
    charged: int
    """1 if the attempt counts against the job."""
    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the job as failed."""

    message: str


def after_loss(job: Job, error: RetryableError | TimeoutError, max_attempts: int) -> Again | GiveUp:
    """Judge the loss of the attempt that ``job`` is in.

    - The worker died, or its accelerator ran out of memory, among neighbours: any of them may be the cause. The job
      is a suspect and runs alone from now on; nothing is charged yet.
    - The same while alone: it was this job. That is charged.
    - Everything else (back pressure, deploys, a lost control map, a lost store, an attempt that ran out of time, for
      most of it may have been spent waiting) is charged to nobody and bounded by ``ATTEMPTS_BOUND``.

    ``max_attempts`` counts charged attempts, and the one that raised the suspicion.
    """
    if job.attempt >= ATTEMPTS_BOUND:
        return GiveUp(f"The job was interrupted {job.attempt} times; the last time: {_reason(error)}")
    harmful = isinstance(error, WorkerLost | OutOfMemory)
    charged = int(harmful and job.suspect)
    suspect = job.suspect or harmful
    if charged and job.charged + charged + int(suspect) >= max_attempts:
        return GiveUp(f"The job was tried {max_attempts} times and failed each time: {_reason(error)}")
    return Again(suspect, charged, min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** (job.attempt - 1)))


def _reason(error: RetryableError | TimeoutError) -> str:
    return error.message if isinstance(error, RetryableError) else "It ran out of time."
