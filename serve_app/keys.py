"""API keys: who may call, and what. Only the SHA-256 of a key is stored."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from serve_app.database import Database, keys
from serve_app.errors import InvalidKey, ValidationFailed, one_of

GENERATE: Final = "generate"
ADMIN: Final = "admin"
SCOPES: Final = (GENERATE, ADMIN)

_PREFIX = "cns_"
_KEY_LENGTH = range(16, 257)
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NAME_MAX = 128
_CACHE_S = 3.0
"""How long a revoked key may still be taken by a process that saw it before."""
_CACHE_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from. A tenant owns jobs, through any of its keys."""

    key_id: str
    tenant: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What may be shown of a key. Times in seconds since the epoch."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[str]
    created_at: float
    revoked_at: float | None

    @property
    def principal(self) -> Principal:
        return Principal(self.id, self.tenant, self.scopes)


class KeyStore:
    """Every statement on keys. Methods block; safe to use from many threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._cache: dict[str, tuple[float, Principal]] = {}  # hash -> (monotonic time of the look-up, principal)

    def create(self, name: str, tenant: str, scopes: Iterable[str], key: str | None = None) -> tuple[str, Principal]:
        """Make a key and return it, for the only time. A ``key`` that is given may be given again: nothing changes.

        Raises:
            ValidationFailed: a scope, the tenant or the given key is not acceptable, or the key was revoked.
        """
        wanted = frozenset(scopes)
        _check(name, tenant, wanted, key)
        plain = key if key is not None else _PREFIX + secrets.token_urlsafe(32)
        with self._database.transaction() as connection:
            self._database.insert_if_new(
                connection,
                keys,
                {
                    "id": secrets.token_hex(8),
                    "tenant": tenant,
                    "name": name,
                    "hash": _hash(plain),
                    "scopes": " ".join(sorted(wanted)),
                    "created_at": self._database.now_sql(),
                },
            )
            record = _record(connection.execute(sa.select(keys).where(keys.c.hash == _hash(plain))).one())
        if record.revoked_at is not None:
            raise ValidationFailed({"key": ["This key was revoked."]})
        if (record.tenant, record.scopes) != (tenant, wanted):
            raise ValidationFailed({"key": ["This key exists with another tenant or other scopes."]})
        return plain, record.principal

    def authenticate(self, key: str) -> Principal:
        """Raises InvalidKey for a key that is unknown or revoked."""
        digest = _hash(key)
        cached = self._cache.get(digest)
        if cached is not None and time.monotonic() - cached[0] < _CACHE_S:
            return cached[1]
        with self._database.read() as connection:
            row = connection.execute(
                sa.select(keys).where(keys.c.hash == digest, keys.c.revoked_at.is_(None))
            ).one_or_none()
        # The look-up compares hashes of the caller's choice only as far as SHA-256 can be steered; the last word is
        # constant-time all the same.
        if row is None or not hmac.compare_digest(row.hash, digest):
            self._cache.pop(digest, None)
            raise InvalidKey
        principal = _record(row).principal
        if len(self._cache) >= _CACHE_MAX:
            self._cache.clear()
        self._cache[digest] = (time.monotonic(), principal)
        return principal

    def revoke(self, key_id: str) -> bool:
        """Whether there was such a key, and it was not revoked yet. Other processes notice within 3 s."""
        with self._database.transaction() as connection:
            changed = connection.execute(
                sa.update(keys)
                .where(keys.c.id == key_id, keys.c.revoked_at.is_(None))
                .values(revoked_at=self._database.now_sql())
            ).rowcount
        self._cache.clear()
        return changed == 1

    def list(self) -> tuple[KeyRecord, ...]:
        """Every key ever made, oldest first."""
        with self._database.read() as connection:
            return tuple(map(_record, connection.execute(sa.select(keys).order_by(keys.c.created_at, keys.c.id))))


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(row.id, row.tenant, row.name, frozenset(row.scopes.split()), row.created_at, row.revoked_at)


def _check(name: str, tenant: str, scopes: frozenset[str], key: str | None) -> None:
    problems: dict[str, list[str]] = {}
    if not 0 < len(name) <= _NAME_MAX:
        problems["name"] = [f"The name must have 1 to {_NAME_MAX} characters."]
    if not _TENANT.fullmatch(tenant):
        problems["tenant"] = ["The tenant must have 1 to 64 letters, digits, '.', '_' or '-'."]
    unknown = sorted(scopes - set(SCOPES))
    if unknown or not scopes:
        problems["scopes"] = [one_of("scope", unknown[0], SCOPES) if unknown else "At least one scope is needed."]
    if key is not None and not (len(key) in _KEY_LENGTH and key.isprintable() and key == key.strip()):
        problems["key"] = ["A given key must have 16 to 256 printable characters, no space at either end."]
    if problems:
        raise ValidationFailed(problems)
