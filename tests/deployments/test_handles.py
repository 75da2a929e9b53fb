"""What Ray raises, as our errors: the table that decides whether a job is retried, and who is blamed."""

import asyncio
import logging

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

from deployments.handles import NODE_DEATH, translate
from serve_app import errors


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
