"""The rules for lost attempts, as a table."""

import pytest

from serve_app.errors import InputLost, OutOfMemory, RetryableError, WorkerBusy, WorkerLost
from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.retries import ATTEMPTS_BOUND, Again, GiveUp, after_loss
from support.jobs import make_spec


def job(attempt: int = 1, charged: int = 0, *, suspect: bool = False) -> Job:
    return Job(
        id=1,
        tenant="alice",
        key_id="k",
        status=JobStatus.PROCESSING,
        spec=make_spec(),
        created_at=0.0,
        attempt=attempt,
        charged=charged,
        suspect=suspect,
    )


@pytest.mark.parametrize(
    ("before", "error", "suspect", "charged"),
    [
        (job(), WorkerLost(), True, 0),
        (job(), OutOfMemory(), True, 0),
        (job(suspect=True), WorkerLost(), True, 1),
        (job(suspect=True), OutOfMemory(), True, 1),
        (job(), TimeoutError(), False, 0),
        (job(suspect=True), TimeoutError(), True, 0),
        (job(), WorkerBusy(), False, 0),
        (job(), InputLost(), False, 0),
        (job(), RetryableError(), False, 0),
        (job(suspect=True), WorkerBusy(), True, 0),
        (job(30), WorkerBusy(), False, 0),
        (job(30), WorkerLost(), True, 0),
    ],
)
def test_who_is_charged(before: Job, error: RetryableError | TimeoutError, suspect: bool, charged: int) -> None:
    verdict = after_loss(before, error, max_attempts=5)
    assert isinstance(verdict, Again)
    assert (verdict.suspect, verdict.charged) == (suspect, charged)


@pytest.mark.parametrize(
    ("error", "deaths"),
    [(WorkerLost(), 5), (OutOfMemory(), 5), (TimeoutError(), ATTEMPTS_BOUND), (WorkerBusy(), ATTEMPTS_BOUND)],
)
def test_how_often_a_hopeless_job_is_tried(error: RetryableError | TimeoutError, deaths: int) -> None:
    current = job()
    while isinstance(verdict := after_loss(current, error, max_attempts=5), Again):
        current = job(current.attempt + 1, current.charged + verdict.charged, suspect=verdict.suspect)
    assert current.attempt == deaths
    assert isinstance(verdict, GiveUp)
    assert str(deaths) in verdict.message


def test_the_pause_grows_up_to_half_a_minute() -> None:
    delays = []
    for attempt in range(1, 12):
        verdict = after_loss(job(attempt), WorkerBusy(), max_attempts=5)
        assert isinstance(verdict, Again)
        delays.append(verdict.delay_s)
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert delays == sorted(delays)
    assert delays[-1] == 30.0
