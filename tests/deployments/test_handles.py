"""RayBackend without Ray: what its errors mean as ours, and what it makes of the answers of many replicas."""

import asyncio
import logging
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, RayServeException

from deployments.handles import NODE_DEATH, RayBackend, translate
from serve_app import errors
from serve_app.config import AppConfig
from serve_app.tasks import AttemptRef


def wrapped(cause: Exception) -> RayTaskError:
    """``cause`` as it arrives when a replica raised it."""
    error: RayTaskError = RayTaskError("generate", f"Traceback: {cause!r}", cause).as_instanceof_cause()
    return error


def died(text: str) -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = f"{ActorDiedError.BASE_ERROR_MSG}\n{text}"
    return error


def lost(kind: type[ObjectLostError]) -> ObjectLostError:
    return kind("00" * 28, None, "")


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (died("The actor is dead because its worker process has died."), errors.WorkerLost),
        (died(f"The actor died because {NODE_DEATH}. Node Id: 1"), errors.WorkerBusy),
        (WorkerCrashedError(), errors.WorkerLost),
        (OutOfMemoryError("worker used too much memory"), errors.WorkerLost),
        (ActorUnavailableError("unavailable", b"0" * 16), errors.WorkerBusy),
        (lost(ObjectLostError), errors.InputLost),
        (lost(OwnerDiedError), errors.InputLost),
        (wrapped(lost(ObjectLostError)), errors.InputLost),
        (BackPressureError(1, 1), errors.WorkerBusy),
        (RayServeException("draining"), errors.WorkerBusy),
        (TaskCancelledError(), errors.WorkerBusy),
        (RayError("something new"), errors.WorkerBusy),
        (asyncio.CancelledError(), errors.WorkerBusy),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.__name__,
)
def test_every_loss_is_retryable(error: BaseException, meaning: type[errors.ServeError]) -> None:
    translated = translate(error)
    assert type(translated) is meaning
    assert isinstance(translated, errors.RetryableError)


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownModel("no such model"),
        errors.OutOfMemory(),
        errors.ValidationFailed({"prompt": ["The prompt field is required."]}),
        errors.QueueFull(retry_after_s=7, tip="queue_max"),
    ],
)
def test_our_own_error_comes_out_as_itself(error: errors.ServeError) -> None:
    translated = translate(wrapped(error))
    assert type(translated) is type(error)
    assert translated.args == error.args


def test_a_fault_of_ours_fails_the_job_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        translated = translate(wrapped(ValueError("secret detail")))
    assert type(translated) is errors.JobError
    assert "secret detail" not in translated.message
    assert "secret detail" in caplog.text


class Replicas:
    """A handle whose replicas answer a broadcast with ``answers``, or not in time."""

    def __init__(self, *answers: object, late: bool = False) -> None:
        self.answers = answers
        self.late = late
        self.asked: list[tuple[object, ...]] = []

    def broadcast(self, *call: object) -> "Replicas":
        self.asked.append(call)
        return self

    async def results_async(self, **_: object) -> list[object]:
        if self.late:
            raise TimeoutError
        return list(self.answers)


async def test_progress_is_what_every_replica_that_answers_knows() -> None:
    here, there, unknown = (AttemptRef(job_id=n, attempt=1) for n in range(3))
    first = Replicas({here: 0.25}, {}, died("gone"))
    second, late = Replicas({there: 0.5}), Replicas({there: 0.9}, late=True)
    handles: Any = {"A": first, "B": second, "C": late}
    backend = RayBackend(AppConfig(), handles["A"], handles)
    assert await backend.progress([here, there]) == {}
    assert first.asked == []  # it sent none of them out
    response: Any = object()
    backend._running |= {here: response, there: response}
    assert await backend.progress([here, there, unknown]) == {here: 0.25, there: 0.5}
    assert first.asked == second.asked == [("progress", (here, there))]
