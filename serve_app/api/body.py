"""The request body: bytes within the limit, then an object of fields, whatever the content type says.

Nobody has shown a key yet: what becomes many objects in memory is counted first, and large bodies are parsed in a
thread, beside the event loop.
"""

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Mapping
from typing import cast
from urllib.parse import unquote_to_bytes

from pydantic import JsonValue
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve_app.errors import BodyTooLarge, InvalidRequest

MAX_FORM_FIELDS = 200
_MAX_DIGITS = 400
_MAX_ITEMS = 100_000
"""Commas and brackets in a JSON body: millions of empty lists fit into 20 MB and take gigabytes as objects."""
_MAX_ESCAPES = 1_000_000
"""Percent signs in a urlencoded body. Each becomes an object for a moment: a million take 0.3 s and 50 MB. Base64 needs
one in 32 letters (``+`` and ``/``), that is 600,000 in 20 MB."""
_SMALL_BYTES = 64 * 1024
"""Up to this size a body is parsed without a thread."""


async def read_fields(request: Request, max_bytes: int) -> dict[str, JsonValue]:
    """The fields of a body: a JSON object, a urlencoded or a multipart form; no body is an object without fields.

    A form's repeated names become a list; an uploaded file becomes its bytes in base64, as an image field takes them.

    Raises:
        BodyTooLarge: more than ``max_bytes``; what follows is not read.
        InvalidRequest: not an object that this API understands.
    """
    body = await _read_bytes(request, max_bytes)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parse = _json_object
    if body.lstrip()[:1] not in {b"{", b"["}:
        if not body.strip():
            return {}
        if kind == "multipart/form-data":
            # Its parser is a coroutine that never waits for anything of this event loop.
            return await asyncio.to_thread(asyncio.run, _multipart(request.headers, body))
        if kind == "application/x-www-form-urlencoded":
            parse = _urlencoded
    return parse(body) if len(body) <= _SMALL_BYTES else await asyncio.to_thread(parse, body)


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    too_large = BodyTooLarge(f"The request body is larger than {max_bytes} bytes.")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def _integer(digits: str) -> int | float:
    # Python refuses to convert thousands of digits; infinity is refused later, by the field that holds it.
    return int(digits) if len(digits) <= _MAX_DIGITS else float("inf")


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _json_object(body: bytes) -> dict[str, JsonValue]:
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_ITEMS:
        raise InvalidRequest
    try:
        value = json.loads(body, parse_int=_integer, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest from error
    if not isinstance(value, dict):
        raise InvalidRequest
    return cast("dict[str, JsonValue]", value)


def _collect(pairs: list[tuple[str, str]]) -> dict[str, JsonValue]:
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name.removesuffix("[]"), []).append(value)
    return {name: values[0] if len(values) == 1 else list[JsonValue](values) for name, values in fields.items()}


def _urlencoded(body: bytes) -> dict[str, JsonValue]:
    if body.count(b"&") >= MAX_FORM_FIELDS or body.count(b"%") > _MAX_ESCAPES:
        raise InvalidRequest
    try:
        pairs = [pair.partition("=") for pair in body.decode().split("&") if pair]
    except UnicodeDecodeError as error:
        raise InvalidRequest from error
    return _collect([(_unquoted(name), _unquoted(value)) for name, _, value in pairs])


def _unquoted(text: str) -> str:
    # Not unquote_plus: it also splits the text at every run of letters beyond ASCII, which nobody has counted.
    return unquote_to_bytes(text.replace("+", " ")).decode(errors="replace")


async def _multipart(headers: Headers, body: bytes) -> dict[str, JsonValue]:
    async def stream() -> AsyncGenerator[bytes, None]:
        # In pieces, for the parser lists what it finds in one before it stores it.
        for start in range(0, len(body), _SMALL_BYTES):
            yield body[start : start + _SMALL_BYTES]

    parser = MultiPartParser(
        headers, stream(), max_files=MAX_FORM_FIELDS, max_fields=MAX_FORM_FIELDS, max_part_size=len(body)
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest from error
    try:
        return _collect([(name, await _part(value)) for name, value in form.multi_items()])
    finally:
        await form.close()


async def _part(value: str | UploadFile) -> str:
    return value if isinstance(value, str) else base64.b64encode(await value.read()).decode()


def key_of(request: Request, fields: Mapping[str, JsonValue]) -> str | None:
    """The API key: the body's ``key``, else a bearer token; None where neither is sent."""
    key = fields.get("key")
    if isinstance(key, str) and key.strip():
        return key.strip()
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
