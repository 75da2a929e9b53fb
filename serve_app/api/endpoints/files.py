"""``GET /generations/<file_prefix>-<n>.png`` and ``GET /inputs/<file_prefix>-<field>``: pictures by unguessable names.

A name leads to its job by the random ``file_prefix``, so that it can be given out before the picture exists and tells
nothing about what is stored: object keys and content hashes are not addressable. Status codes are real ones here.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.envelopes import AsciiJSONResponse
from serve_app.api.services import Services
from serve_app.images import sniff
from serve_app.jobs.job import Job, JobStatus

_PREFIX = r"(?P<prefix>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_OUTPUT = re.compile(_PREFIX + r"-(?:control-)?[0-9]{1,3}\.png")
_INPUT = re.compile(_PREFIX + r"-(?P<field>[a-z_]+(?:\.[0-9]{1,3})?)")
_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})")

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Accept-Ranges": "bytes",
}
FINAL = "public, max-age=86400, immutable"
"""Cache-Control of a finished picture: its bytes never change."""


def file_routes(services: Services) -> Iterator[APIRoute]:
    async def generation(request: Request) -> Response:
        """A picture or a control map: 404 with Retry-After until it exists, 410 when it never will or is gone."""
        return await _generation(request, services)

    async def stored_input(request: Request) -> Response:
        """A picture that was sent inline, as long as its job is not done."""
        return await _stored_input(request, services)

    handlers: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/generations/{name}": generation,
        "/inputs/{name}": stored_input,
    }
    for path, handler in handlers.items():
        yield APIRoute(path, handler, methods=["GET"], response_model=None, response_class=Response)
        yield APIRoute(path, handler, methods=["HEAD"], response_model=None, include_in_schema=False)


async def _generation(request: Request, services: Services) -> Response:
    name = request.path_params["name"]
    match = _OUTPUT.fullmatch(name)
    job = await asyncio.to_thread(services.jobs.find, match["prefix"]) if match else None
    if job is None or name not in (*job.spec.output_names, *job.spec.map_names):
        return _absent(404, "No such file.")
    if not job.status.ended:
        outlook = await asyncio.to_thread(services.jobs.outlook, job.id)
        return _absent(404, "The file does not exist yet.", {"Retry-After": str(outlook.eta_s)})
    if job.status is not JobStatus.SUCCESS or job.result is None:
        return _absent(410, f"The job has ended without a picture: {job.status.value}.")
    keys = dict(zip(job.spec.output_names, job.result.keys, strict=True))
    keys |= zip(job.spec.map_names, job.result.map_keys, strict=True)
    return await _send(request, services, keys[name])


async def _stored_input(request: Request, services: Services) -> Response:
    match = _INPUT.fullmatch(request.path_params["name"])
    job = await asyncio.to_thread(services.jobs.find, match["prefix"]) if match else None
    key = _inline_key(job, match["field"]) if match and job else None
    if key is None:
        return _absent(404, "No such file.")
    return await _send(request, services, key, is_input=True)


def _inline_key(job: Job, field: str) -> str | None:
    return next((ref.key for ref in job.spec.inputs if ref.field == field), None)


async def _send(request: Request, services: Services, key: str, *, is_input: bool = False) -> Response:
    objects = services.objects
    info = await asyncio.to_thread(objects.info, key)
    if info is None:
        return _absent(410, "The file has been deleted.")
    etag = f'"{hashlib.sha256(key.encode()).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": etag, "Cache-Control": "no-store" if is_input else FINAL}
    if (known := request.headers.get("if-none-match", "")) == "*" or etag in known:
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range") if request.headers.get("if-range", etag) == etag else None
    try:
        span = read_range(wanted, info.size_bytes)
    except ValueError:
        return _absent(416, "The range is outside the file.", {"Content-Range": f"bytes */{info.size_bytes}"})
    first, last = span or (0, info.size_bytes - 1)
    headers["Content-Length"] = str(last - first + 1)
    if span:
        headers["Content-Range"] = f"bytes {first}-{last}/{info.size_bytes}"
    content_type = info.content_type
    data = b""
    try:
        if is_input:
            head = await asyncio.to_thread(objects.get_range, key, 0, min(63, info.size_bytes - 1))
            content_type = _media_type(head)
        if request.method != "HEAD":
            data = await asyncio.to_thread(objects.get_range, key, first, last)
    except KeyError:
        return _absent(410, "The file has been deleted.")
    return Response(data, 206 if span else 200, headers, media_type=content_type)


def _media_type(head: bytes) -> str:
    """What the bytes are, not what a client said they were."""
    kind = sniff(head)
    return f"image/{kind.lower()}" if kind else "application/octet-stream"


def read_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """First and last byte of a single range (RFC 9110 14.1.2); None: send everything.

    Lists of ranges and what is no range at all are ignored, as the RFC allows.

    Raises:
        ValueError: the range begins beyond the end.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not (match["first"] or match["last"]):
        return None
    if not match["first"]:
        first, last = max(0, size_bytes - int(match["last"])), size_bytes - 1
    else:
        first, last = int(match["first"]), min(int(match["last"] or size_bytes), size_bytes - 1)
        if match["last"] and int(match["last"]) < first:
            return None
    if first >= size_bytes:
        raise ValueError(header)
    return first, last


def _absent(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    body = {"status": "error", "message": message, "messege": message}
    return AsciiJSONResponse(body, status, {**(headers or {}), "Cache-Control": "no-store"})
