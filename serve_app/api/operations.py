"""Operations: a handler, who may call it and under which paths; and how a row becomes routes.

Official SDKs disagree with the documentation about paths, so that each operation is served under several prefixes.
Reading the body, the key, the rate and the choice of status codes happen here, once, for all of them.
"""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Literal

from fastapi.routing import APIRoute
from pydantic import BaseModel, JsonValue
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.auth import RateWindow, authenticate
from serve_app.api.body import key_of, read_fields
from serve_app.api.envelopes import Answer, ErrorAnswer, preferences, respond
from serve_app.api.fields import WireModel
from serve_app.api.services import Services
from serve_app.errors import InvalidKey
from serve_app.keys import Principal

CANONICAL_PREFIX = "/api/v1/enterprise"
PREFIXES = (
    CANONICAL_PREFIX,
    f"{CANONICAL_PREFIX}/images",
    f"{CANONICAL_PREFIX}/community",
    f"{CANONICAL_PREFIX}/txt2img",
)
V6_PREFIX = "/api/v6/images"
_NOT_WORD = re.compile(r"\W+")

ERROR_CODES: Mapping[int, str] = {
    400: "Invalid request or fields (with `Prefer: http-status`)",
    401: "Invalid key (with `Prefer: http-status`)",
    403: "The key lacks a scope (with `Prefer: http-status`)",
    404: "No such object (with `Prefer: http-status`)",
    413: "The body is too large (with `Prefer: http-status`)",
    429: "A rate or queue limit; see `Retry-After` (with `Prefer: http-status`)",
    500: "Unexpected error (with `Prefer: http-status`)",
    503: "Not able to take requests now (with `Prefer: http-status`)",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a handler sees it."""

    services: Services
    fields: Mapping[str, JsonValue]
    """The body."""
    path: Mapping[str, str]
    """Path parameters."""
    query: Mapping[str, str]
    preferences: frozenset[str]
    caller: Principal | None
    """None for a keyless call, which only some operations allow."""

    @property
    def principal(self) -> Principal:
        """The caller of an operation that needs a key."""
        if self.caller is None:
            raise InvalidKey
        return self.caller


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table of operations."""

    path: str
    """Below each prefix."""
    handler: Callable[[Call], Awaitable[Answer]]
    """Its docstring describes the operation in the OpenAPI document."""
    answers: Sequence[type[BaseModel]]
    request: type[WireModel] | None = None
    """Model of the body, for the OpenAPI document; handlers parse the body themselves."""
    method: Literal["GET", "POST", "DELETE"] = "POST"
    scope: str = ""
    """What the key must be allowed to do; empty: any valid key."""
    keyless: bool = False
    """Whether the call may come without a key. A key that is sent is checked all the same."""
    metered: bool = False
    """Whether a call counts against the key's rate."""
    prefixes: Sequence[str] = field(default=PREFIXES)

    @property
    def name(self) -> str:
        """Unique in the table: ``post_controlnet``, ``get_fetch_request_id``."""
        return f"{self.method}_{_NOT_WORD.sub('_', self.path).strip('_')}".lower()


def routes(operations: Sequence[Operation], services: Services) -> Iterator[APIRoute]:
    """Every path of every operation; the first prefix is the documented one."""
    rates = RateWindow(services.config.limits.requests_per_minute)
    for operation in operations:
        endpoint = _endpoint(operation, services, rates)
        for prefix in operation.prefixes:
            yield APIRoute(
                f"{prefix}/{operation.path}",
                endpoint,
                methods=[operation.method],
                name=operation.name,
                operation_id=operation.name if prefix == operation.prefixes[0] else None,
                include_in_schema=prefix == operation.prefixes[0],
                description=operation.handler.__doc__,
                response_model=None,
                responses=_responses(operation),
                openapi_extra=_request_body(operation),
            )


def _endpoint(operation: Operation, services: Services, rates: RateWindow) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        fields = await read_fields(request, services.config.server.max_body_bytes)
        caller = await _caller(operation, services, key_of(request, fields))
        if operation.metered and caller is not None:
            rates.take(caller.key_id)
        call = Call(services, fields, request.path_params, dict(request.query_params), preferences(request), caller)
        return respond(request, await operation.handler(call))

    return endpoint


async def _caller(operation: Operation, services: Services, key: str | None) -> Principal | None:
    if key is None and operation.keyless:
        return None
    return await authenticate(services.keys, key, operation.scope)


def _responses(operation: Operation) -> dict[int | str, dict[str, Any]]:
    """Under HTTP 200 also the error answer: see ``envelopes``."""
    union: Any = reduce(or_, [*operation.answers, ErrorAnswer])
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": union, "description": "The result, or an error in the body"}
    }
    for code, description in ERROR_CODES.items():
        responses[code] = {"model": ErrorAnswer, "description": description}
    return responses


def _request_body(operation: Operation) -> dict[str, Any] | None:
    if operation.request is None:
        return None
    schema = operation.request.model_json_schema()
    kinds = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}
