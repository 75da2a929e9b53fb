"""Object storage: pictures in and out, by key.

A key is a relative POSIX path of ``[A-Za-z0-9._-]`` parts. All methods block: callers on an event loop use a thread.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from serve_app.errors import ConfigError, one_of


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    size_bytes: int
    content_type: str
    modified_at: float
    """Seconds since the epoch."""


class ObjectStore(Protocol):
    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store ``data``; readers see all of it or nothing. Overwrites."""
        ...

    def get(self, key: str) -> bytes:
        """Raises KeyError when there is no such object."""
        ...

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end``, both included. Raises KeyError."""
        ...

    def info(self, key: str) -> ObjectInfo | None: ...

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object whose key starts with ``prefix + '/'``."""
        ...


def _local(url: str) -> ObjectStore:
    from serve_app.storage.local import LocalStore

    return LocalStore.from_url(url)


STORAGES: Mapping[str, Callable[[str], ObjectStore]] = {"file": _local}
"""URL scheme -> how its store is opened."""


def open_store(url: str) -> ObjectStore:
    """Raises ConfigError for a scheme that is not in STORAGES."""
    scheme = urlsplit(url).scheme
    if scheme not in STORAGES:
        raise ConfigError(one_of("storage scheme", scheme, tuple(STORAGES)))
    return STORAGES[scheme](url)
