"""The shapes of answers: how an error of ``serve_app.errors`` and a result become HTTP.

Every answer below ``/api/`` is HTTP 200, errors too, because the official SDKs throw away the body of anything else.
``Prefer: http-status`` turns on the right codes with the same bodies. Files and health checks always use them.
"""

import json
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, JsonValue
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.database import OUTAGES
from serve_app.errors import InvalidKey, RateLimited, ServeError, ValidationFailed, WorkerBusy

logger = logging.getLogger(__name__)

KEY_TIP = "Send your API key as 'key' in the request body, or as 'Authorization: Bearer <key>'."
RETRY_AFTER_OUTAGE_S = 5

Body = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Answer:
    """A body, the status it deserves, and headers."""

    body: Body
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class ErrorAnswer(BaseModel):
    """Something is wrong with the request, or with the server."""

    status: Literal["error"] = "error"
    message: str | dict[str, list[str]]
    """A sentence, or an object: field name to its messages."""
    messege: str | dict[str, list[str]]
    """The same; real clients read this spelling."""
    tip: str | None = None
    tips: str | None = None
    retry_after: int | None = None


class SuccessAnswer(BaseModel):
    """The job is done."""

    status: Literal["success"] = "success"
    generationTime: float  # noqa: N815  - wire name
    """Seconds."""
    id: int
    output: list[str]
    """One URL per picture."""
    proxy_links: list[str]
    image_links: list[str]
    control_maps: list[str] | None = None
    """With ``return_control_maps: yes``, one URL per ControlNet."""
    meta: dict[str, JsonValue]
    """The request under the vendor's names, with effective values."""
    nsfw_content_detected: bool | None
    """null where no safety model is loaded."""
    webhook_status: str | None
    track_id: str | int | float | bool | None


class ProcessingAnswer(BaseModel):
    """The job is accepted and not done yet."""

    status: Literal["processing"] = "processing"
    tip: str | None = None
    eta: int
    """Estimated seconds to the end, at least 1."""
    queue_position: int | None = None
    progress: float | None = None
    """0 to 1: the share of the model evaluations that was done a few seconds ago."""
    message: str
    messege: str
    fetch_result: str | None = None
    """URL to ask again."""
    id: int
    output: list[str] | str
    meta: dict[str, JsonValue] | None = None
    future_links: list[str] | None = None
    """The URLs of the pictures once they exist."""
    future_control_maps: list[str] | None = None
    """The URLs of the control maps once they exist."""


class FailedAnswer(BaseModel):
    """The job ended without pictures, or there is no such job."""

    status: Literal["failed"] = "failed"
    id: int | Literal[""]
    message: str
    messege: str
    output: Literal[""] = ""


class AsciiJSONResponse(JSONResponse):
    """JSON with everything beyond ASCII escaped, so that no text a client sent can break the encoding."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def preferences(request: Request) -> frozenset[str]:
    """The tokens of all ``Prefer`` headers, in lower case (RFC 7240)."""
    header = ",".join(request.headers.getlist("prefer"))
    return frozenset(part.partition(";")[0].strip().lower() for part in header.split(","))


def respond(request: Request, answer: Answer) -> Response:
    """HTTP 200, or the answer's own status outside of the enterprise API and for a client that prefers it."""
    coded = "http-status" in preferences(request) or "/api/" not in request.scope["path"]
    status = answer.status if coded else 200
    return AsciiJSONResponse(dict(answer.body), status, dict(answer.headers))


def error_answer(error: ServeError) -> Answer:
    message: JsonValue = (
        {name: list[JsonValue](texts) for name, texts in error.fields.items()}
        if isinstance(error, ValidationFailed)
        else error.message
    )
    body: dict[str, JsonValue] = {"status": "error", "message": message, "messege": message}
    headers: dict[str, str] = {}
    if isinstance(error, InvalidKey):
        body["tip"] = KEY_TIP
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RateLimited):
        body |= {"tips": error.tip, "retry_after": error.retry_after_s}
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, WorkerBusy):
        body["retry_after"] = RETRY_AFTER_OUTAGE_S
        headers["Retry-After"] = str(RETRY_AFTER_OUTAGE_S)
    return Answer(body, error.status, headers)


def unavailable() -> Answer:
    """The database cannot be reached; nothing was accepted."""
    return error_answer(WorkerBusy("The server cannot take requests right now. Please try again."))


async def on_serve_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ServeError):
        raise error
    if error.status >= 500:  # noqa: PLR2004  - server errors
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return respond(request, error_answer(error))


async def on_database_outage(request: Request, error: Exception) -> Response:
    logger.error("%s %s: the database is unavailable", request.method, request.url.path, exc_info=error)
    return respond(request, unavailable())


async def on_http_exception(request: Request, error: Exception) -> Response:
    """No such route, or the wrong method. These keep their codes: no SDK asks for them, monitoring does."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if request.method == "OPTIONS" and error.status_code == 405:  # noqa: PLR2004  - method not allowed
        return Response(status_code=204, headers=headers)
    body = {"status": "error", "message": error.detail, "messege": error.detail}
    return AsciiJSONResponse(body, error.status_code, headers)


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    ServeError: on_serve_error,
    **dict.fromkeys(OUTAGES, on_database_outage),
    HTTPException: on_http_exception,
}
"""Exception class to the function that answers it; the application hands them to FastAPI."""


class LastResort:
    """ASGI middleware: an error nobody expected is logged with its traceback and answered as JSON without one.

    It stands inside the CORS middleware, so that browsers can read the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except ClientDisconnect:
            logger.info("%s %s: the client hung up while it sent its request", scope["method"], scope["path"])
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            request = Request(scope, receive)
            await respond(request, error_answer(ServeError("Internal server error")))(scope, receive, send)
