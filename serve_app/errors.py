"""Every error this project raises on purpose, as one tree.

    ServeError
    ├── ConfigError               the operator's configuration is wrong; nothing starts
    ├── RequestError              the caller's request is answered with an error, no job is made
    │   ├── InvalidRequest        400  the body is not an object this API understands
    │   ├── ValidationFailed      400  one or more fields are wrong; carries all of them
    │   ├── InvalidKey            401
    │   ├── NotPermitted          403
    │   ├── NotFound              404
    │   ├── BodyTooLarge          413
    │   ├── RateLimited           429
    │   └── QueueFull             429
    ├── JobError                  the job ends as failed with this message; a retry would not help
    │   ├── FetchFailed           an input link could not be fetched
    │   ├── ImageRejected         the bytes are not an image this API accepts
    │   ├── AnnotatorUnavailable  the control type has no annotator here
    │   └── ModelError
    │       ├── UnknownModel
    │       ├── FamilyMismatch
    │       ├── UnsafeModel       pickles, remote code
    │       └── ModelLoadFailed
    ├── Cancelled                 the job was cancelled by its owner
    └── RetryableError            nobody's fault: the dispatcher runs the job again
        ├── WorkerLost            the process died while it held the job; the job is a suspect
        ├── InputLost             a control map vanished; start again from the annotator
        ├── WorkerBusy            back pressure, draining, deploying; charges nobody
        └── OutOfMemory           the accelerator ran out of memory

Errors travel between processes, so every one must survive pickling: they keep their arguments in ``args``.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar


class ServeError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message if message is not None else (type(self).__doc__ or "").strip())

    @property
    def message(self) -> str:
        return str(self.args[0])


class ConfigError(ServeError):
    """The configuration is invalid."""

    code = "config"


class RequestError(ServeError):
    """The request is refused."""

    code = "request"
    status = 400


class InvalidRequest(RequestError):
    """Invalid API Request"""

    code = "invalid_request"


class ValidationFailed(RequestError):
    """One or more fields are invalid."""

    code = "validation"

    def __init__(self, fields: Mapping[str, Sequence[str]]) -> None:
        """``fields`` maps each bad field to its messages; all of them are answered at once."""
        Exception.__init__(self, {name: list(messages) for name, messages in fields.items()})

    @property
    def fields(self) -> dict[str, list[str]]:
        return dict(self.args[0])

    @property
    def message(self) -> str:
        return "; ".join(text for messages in self.fields.values() for text in messages)


class InvalidKey(RequestError):
    """Invalid Api Key"""

    code = "invalid_key"
    status = 401


class NotPermitted(RequestError):
    """This key is not allowed to do that."""

    code = "not_permitted"
    status = 403


class NotFound(RequestError):
    """Request not found"""

    code = "not_found"
    status = 404


class BodyTooLarge(RequestError):
    """The request body is too large."""

    code = "too_large"
    status = 413


class RateLimited(RequestError):
    """Rate limit exceeded"""

    code = "rate_limited"
    status = 429

    def __init__(self, message: str | None = None, retry_after_s: int = 1, tip: str = "") -> None:
        super().__init__(message)
        self.args = (self.args[0], retry_after_s, tip)

    @property
    def retry_after_s(self) -> int:
        return int(self.args[1])

    @property
    def tip(self) -> str:
        """What limit was met and its value."""
        return str(self.args[2])


class QueueFull(RateLimited):
    """Rate limit exceeded"""

    code = "queue_full"


class JobError(ServeError):
    """The job cannot be done."""

    code = "job"


class FetchFailed(JobError):
    """Unable to fetch image from provided URL"""

    code = "fetch_failed"


class ImageRejected(JobError):
    """The image is not acceptable."""

    code = "image_rejected"


class AnnotatorUnavailable(JobError):
    """No annotator for this control type."""

    code = "annotator_unavailable"


class ModelError(JobError):
    """The model cannot be used."""

    code = "model"


class UnknownModel(ModelError):
    """Model not found"""

    code = "unknown_model"


class FamilyMismatch(ModelError):
    """The ControlNet belongs to another base family."""

    code = "family_mismatch"


class UnsafeModel(ModelError):
    """The model could run code when loaded."""

    code = "unsafe_model"


class ModelLoadFailed(ModelError):
    """The model could not be loaded."""

    code = "model_load_failed"


class Cancelled(ServeError):
    """The job was cancelled."""

    code = "cancelled"


class RetryableError(ServeError):
    """The work was lost and can be done again."""

    code = "retryable"
    status = 503


class WorkerLost(RetryableError):
    """The process that held the job died."""

    code = "worker_lost"


class InputLost(RetryableError):
    """A control map was lost before it was used."""

    code = "input_lost"


class WorkerBusy(RetryableError):
    """No worker can take the job now."""

    code = "worker_busy"


class OutOfMemory(RetryableError):
    """The accelerator ran out of memory."""

    code = "out_of_memory"


def one_of(field: str, value: object, allowed: Sequence[str]) -> str:
    """The message for a name that is not in a table: says what was sent and what is allowed."""
    return f"The {field} {value!r} is unknown. Allowed: {', '.join(allowed)}."
