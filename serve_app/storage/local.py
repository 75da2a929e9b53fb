"""LocalStore: objects as files of one folder; a mounted folder serves several machines.

The content type is kept in the file itself, *behind* the data (a picture may be base64 text although it is named
``.png``): one rename publishes both at once, and pictures in the folder still open in any viewer.

    data | content type, ASCII | its length, 1 byte | b"\\x00cns"
"""

import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import unquote, urlsplit

from serve_app.errors import ConfigError
from serve_app.storage import ObjectInfo

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_MAGIC = b"\x00cns"
_TAIL = len(_MAGIC) + 1
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class LocalStore:
    """An ``ObjectStore`` in ``root``, which is made when absent.

    Parts of a key start with a letter, digit, ``_`` or ``-``; every method raises ValueError for another key, and
    OSError when the disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._temporary = self._root / ".tmp"  # no key starts with a dot
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"storage.url: {error}") from error

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Raises ConfigError for anything but ``file:///folder``."""
        parts = urlsplit(url)
        if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
            raise ConfigError(f"storage.url: expected file:///folder, got {url!r}")
        return cls(Path(unquote(parts.path)))

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store ``data``, on the disk when this returns; readers see all of it or nothing. Overwrites."""
        path = self._path(key)
        trailer = content_type.encode("ascii")
        length = len(trailer).to_bytes(1)  # OverflowError is right: no such type exists
        temporary = self._temporary / secrets.token_hex(12)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.write(trailer + length + _MAGIC)
                file.flush()
                os.fsync(file.fileno())
            self._publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def get(self, key: str) -> bytes:
        return self._read(key, lambda file, info: file.read(info.size_bytes))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        def read(file: BinaryIO, info: ObjectInfo) -> bytes:
            file.seek(start)
            return file.read(max(0, min(end + 1, info.size_bytes) - start))

        return self._read(key, read)

    def info(self, key: str) -> ObjectInfo | None:
        try:
            with self._path(key).open("rb") as file:
                return _info(file)
        except _ABSENT:
            return None

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink()
        except _ABSENT:
            return
        self._prune(path.parent)

    def delete_prefix(self, prefix: str) -> None:
        path = self._path(prefix)
        while path.is_dir():
            try:
                shutil.rmtree(path)
            except FileNotFoundError:
                continue  # somebody else deletes it too
        self._prune(path.parent)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not all(_PART.fullmatch(part) for part in parts):
            raise ValueError(f"not an object key: {key!r}")
        return self._root.joinpath(*parts)

    def _read(self, key: str, read: Callable[[BinaryIO, ObjectInfo], bytes]) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                info = _info(file)
                file.seek(0)
                return read(file, info)
        except _ABSENT:
            raise KeyError(key) from None

    def _publish(self, temporary: Path, path: Path) -> None:
        while True:
            try:
                self._make_folder(path.parent)
                temporary.replace(path)
                break
            except FileNotFoundError:
                if not temporary.exists():
                    raise
                # The folder was empty, and a deletion pruned it in between.
        with suppress(FileNotFoundError):  # deleted already, folder and all
            _sync_folder(path.parent)

    def _make_folder(self, folder: Path) -> None:
        while not folder.is_dir():
            self._make_folder(folder.parent)
            try:
                folder.mkdir()
            except FileExistsError:
                if folder.is_file():
                    raise
                continue  # made by another writer, and perhaps pruned again by a deletion
            _sync_folder(folder.parent)

    def _prune(self, folder: Path) -> None:
        """Remove folders that a deletion left empty."""
        while folder != self._root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # its parent may still be there, and empty
            except OSError:
                return  # not empty
            folder = folder.parent


def _info(file: BinaryIO) -> ObjectInfo:
    """Size, type and age of an open object. Raises OSError when the file was not written by this store."""
    status = os.fstat(file.fileno())
    file.seek(max(0, status.st_size - _TAIL))
    tail = file.read(_TAIL)
    if tail[1:] != _MAGIC:
        raise OSError(f"{file.name} was not written by this store")
    size = status.st_size - _TAIL - tail[0]
    file.seek(size)
    return ObjectInfo(size, file.read(tail[0]).decode("ascii"), status.st_mtime)


def _sync_folder(folder: Path) -> None:
    """Make a rename or a new folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
