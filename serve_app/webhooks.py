"""Webhooks: body bytes, Standard Webhooks signatures, one delivery. Knows nothing of jobs.

Signature scheme: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import logging
from collections.abc import Mapping
from typing import Final, Protocol

from pydantic import JsonValue

from serve_app.errors import ConfigError, FetchFailed

logger = logging.getLogger(__name__)

DELIVERED: Final = "delivered"
_KEY_PREFIX = "whsec_"


class Poster(Protocol):
    """The sending side of ``serve_app.fetching.GuardedClient``."""

    async def post(self, url: str, body: bytes, headers: Mapping[str, str], timeout_s: float) -> int:
        """Raises FetchFailed."""
        ...


def encode_body(body: Mapping[str, JsonValue]) -> bytes:
    """The exact bytes that are sent, and signed."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def secret_bytes(secret: str) -> bytes:
    """The signing key of a ``whsec_...`` secret.

    Raises:
        ConfigError: it is not ``whsec_`` and base64.
    """
    try:
        key = base64.b64decode(secret.removeprefix(_KEY_PREFIX), validate=True)
    except ValueError as error:
        raise ConfigError("the webhook secret must be 'whsec_' and base64") from error
    if not secret.startswith(_KEY_PREFIX) or not key:
        raise ConfigError("the webhook secret must be 'whsec_' and base64")
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """``v1,<base64 of HMAC-SHA256 over id.timestamp.body>``."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()


def headers(message_id: str, timestamp: int, body: bytes, key: bytes | None) -> dict[str, str]:
    """Headers of one delivery. ``timestamp`` in seconds since the epoch; without a ``key`` it is not signed."""
    fields = {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
    }
    if key is not None:
        fields["webhook-signature"] = signature(key, message_id, timestamp, body)
    return fields


async def deliver(client: Poster, url: str, body: bytes, fields: Mapping[str, str], timeout_s: float) -> str:
    """Try once. Returns ``delivered`` or ``failed: <why>``; a receiver's trouble is never an exception."""
    try:
        code = await client.post(url, body, fields, timeout_s)
    except FetchFailed:
        # Why in detail is in the client's own log: the status must not tell what stands at a private address.
        return "failed: the address could not be reached"
    return DELIVERED if 200 <= code < 300 else f"failed: HTTP {code}"  # noqa: PLR2004  - any success code
