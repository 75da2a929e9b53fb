"""Loaded detector networks within a budget of bytes: loaded on first use, once for all who wait, the least recently
used gone first, never one that is in use.

Networks are in eval mode without gradients and hold no state, so any number of threads use one at once.
"""

import gc
import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, Self

from serve_app.annotators.weights import NETWORKS, WeightStore
from serve_app.errors import (
    AnnotatorUnavailable,
    ModelError,
    ModelLoadFailed,
    OutOfMemory,
    RetryableError,
    UnsafeModel,
    WorkerLost,
)

logger = logging.getLogger(__name__)


class FileState(NamedTuple):
    """A file's content as far as its directory entry tells: every write and every replacement changes it."""

    path: str
    size_bytes: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises OSError: there is no such file."""
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_ctime_ns, stat.st_ino)


@dataclass(eq=False, slots=True)
class _Slot:
    """A network that is loaded or being loaded. Changed under the host's lock only."""

    future: "Future[Any]" = field(default_factory=Future)
    claimed: bool = False
    """Whether somebody loads it, or has."""
    pins: int = 0
    last_used: int = 0
    size_bytes: int = 0
    """0 until loaded."""
    files: tuple[FileState, ...] = ()
    """What it was loaded from."""


class DetectorHost:
    """One per process; every method is safe in any thread. See ``serve_app.annotators.source.Networks``.

    ``device``: ``auto`` (cuda where torch sees a GPU, else the CPU) or a name that torch knows. ``budget_bytes`` bounds
    what is loaded, save that networks in use stay. torch is imported with the first network. How many threads torch
    uses is the process's setting and left alone here.
    """

    def __init__(self, store: WeightStore, device: str = "auto", budget_bytes: int = 4 * 1024**3) -> None:
        self.store = store
        self._device_name = device
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._slots: dict[str, _Slot] = {}
        self._uses = 0
        self._damaged: dict[str, tuple[FileState, ...]] = {}
        """Network -> the files that it could not be made of."""
        self.loads = 0
        """Networks loaded so far."""

    @contextmanager
    def lease(self, names: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """The networks of these names, for the length of the context, in which torch keeps no gradients.

        Raises:
            AnnotatorUnavailable: weights or a package are missing.
            ModelLoadFailed, UnsafeModel: the weights are damaged or not those that were published.
            OutOfMemory: no room on the device, at loading or while the context runs.
            WorkerLost: the device broke.
            ConfigError: there is no such device here.
            RetryableError: the files were replaced while they were read.
        """
        if not names:
            yield {}
            return
        with ExitStack() as pins:
            slots = {name: self._pin(name) for name in names}
            for slot in slots.values():
                pins.callback(self._unpin, slot)
            with _translated():
                import torch

                networks = {name: self._value(name, slot) for name, slot in slots.items()}
                with torch.inference_mode():
                    yield networks

    def files(self, names: Sequence[str]) -> tuple[FileState, ...]:
        """The files that these networks are made of: as they were loaded, or as they lie there if not in memory.

        Raises:
            AnnotatorUnavailable: weights or a package are missing.
        """
        with self._lock:
            loaded = {name: slot.files for name, slot in self._slots.items() if slot.size_bytes}
        return tuple(state for name in names for state in loaded.get(name) or self._files(name))

    def problem(self, name: str) -> str | None:
        """What keeps a network from running here, or None: its files, or that they turned out to be damaged.

        Opens no file. Damage is known once somebody has tried to load them, and forgotten when they change.
        """
        problem = self.store.problem(name)
        if problem is not None:
            return problem
        with self._lock:
            damaged = self._damaged.get(name)
        if damaged is None:
            return None
        try:
            same = self._files(name) == damaged
        except (AnnotatorUnavailable, RetryableError):  # being replaced right now
            same = False
        weights = NETWORKS[name].weights
        return _damage(weights, self.store.row(weights).label) if same else None

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda`` ... Raises ConfigError: there is no such device here."""
        return str(self._device().type)

    def loaded(self) -> tuple[str, ...]:
        """Names of what is in memory, least recently used first."""
        with self._lock:
            return tuple(name for name, _ in self._by_age())

    @property
    def loaded_bytes(self) -> int:
        with self._lock:
            return self._loaded_bytes()

    def _pin(self, name: str) -> _Slot:
        with self._lock:
            slot = self._slots.setdefault(name, _Slot())
            self._uses += 1
            slot.last_used = self._uses
            slot.pins += 1
            return slot

    def _unpin(self, slot: _Slot) -> None:
        with self._lock:
            slot.pins -= 1
            self._make_room()

    def _value(self, name: str, slot: _Slot) -> Any:
        """The network: loaded here by the first who asks, waited for by the others."""
        with self._lock:
            mine, slot.claimed = not slot.claimed, True
        if mine:
            self._load(name, slot)
        return slot.future.result()

    def _load(self, name: str, slot: _Slot) -> None:
        """A slot that fails is forgotten before its waiters hear of it, so they may try again."""
        started = time.monotonic()
        try:
            files, value = self._read_unchanged(name)
        except BaseException as error:
            with self._lock:
                del self._slots[name]  # nobody else has put one there: this one was claimed
            slot.future.set_exception(error)
            raise
        with self._lock:
            slot.files = files
            slot.size_bytes = max(1, _size_bytes(value))
            self.loads += 1
            self._make_room()
        logger.info("loaded the network %s, %d bytes, in %.2f s", name, slot.size_bytes, time.monotonic() - started)
        slot.future.set_result(value)

    def _read_unchanged(self, name: str) -> tuple[tuple[FileState, ...], Any]:
        """A network, and the files that it is of for certain."""
        before = self._files(name)
        try:
            value = self._read(name)
        except ModelError as error:
            if not _passes(error):
                with self._lock:
                    self._damaged[name] = before
            raise
        with self._lock:
            self._damaged.pop(name, None)
        if self._files(name) != before:
            raise RetryableError(f"The weights {NETWORKS[name].weights} were replaced while they were loaded.")
        return before, value

    def _files(self, name: str) -> tuple[FileState, ...]:
        self.store.require(name)
        try:
            return tuple(map(FileState.of, self.store.files(NETWORKS[name].weights)))
        except OSError as error:
            raise RetryableError(f"The weights {NETWORKS[name].weights} are being replaced.") from error

    def _read(self, name: str) -> Any:
        row = NETWORKS[name]
        path = self.store.require(name)
        weights = self.store.row(row.weights)
        try:
            for file in self.store.files(row.weights):  # libraries call what may not be read not there, or damaged
                with file.open("rb"):
                    pass
            if weights.sha256 is not None and path.suffix != ".safetensors":  # those hold numbers only: weights verify
                check_hash(path, weights.sha256)
            with self._lock:
                self._make_room(path.stat().st_size)
            value = resolve_name(row.loader)(path)
        except PermissionError as error:
            logger.exception("the weights %s cannot be read", row.weights)
            raise ModelLoadFailed(f"The weights {weights.label} cannot be read by this user.") from error
        except (ModelError, OSError) as error:
            # Clients read the message; where files lie on the server is for the log.
            logger.exception("the weights %s cannot be loaded from %s", row.weights, path)
            kind = type(error) if isinstance(error, ModelError) else ModelLoadFailed
            said = _damage(row.weights, weights.label)
            raise kind(f"{said[0].upper()}{said[1:]}.") from error
        return value.to(self._device()) if hasattr(value, "parameters") else value

    def _device(self) -> Any:
        from serve_app.models.devices import pick_device

        return pick_device(self._device_name)

    def _make_room(self, wanted_bytes: int = 0) -> None:
        """Drop networks that nobody uses, the least recently used first, until ``wanted_bytes`` more would fit."""
        for name, slot in self._by_age():
            if self._loaded_bytes() + wanted_bytes <= self._budget_bytes:
                return
            if slot.pins == 0:
                del self._slots[name]
                logger.info("dropped the network %s, %d bytes", name, slot.size_bytes)

    def _loaded_bytes(self) -> int:
        return sum(slot.size_bytes for slot in self._slots.values())

    def _by_age(self) -> list[tuple[str, _Slot]]:
        loaded = [(name, slot) for name, slot in self._slots.items() if slot.size_bytes]
        return sorted(loaded, key=lambda item: item[1].last_used)


def _passes(error: BaseException | None) -> bool:
    """Whether the system is the reason, not the file. Libraries raise OSError, without a number, for bad files too."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            return True
        error = error.__cause__
    return False


def _damage(name: str, label: str) -> str:
    return (
        f"the weights {label} are damaged or not those that were published; "
        f"run: controlnet-serve weights verify {name}, with the server's --data or -c"
    )


def check_hash(path: Path, expected: str) -> None:
    """Raises UnsafeModel: the file is not the one with this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UnsafeModel(f"{path}: its SHA-256 is {found}, not {expected} as published")


@contextmanager
def _translated() -> Iterator[None]:
    """Torch's errors about the device in our words."""
    try:
        yield
    except Exception as error:
        import torch

        from serve_app.models.device_errors import is_out_of_memory

        if is_out_of_memory(error):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise OutOfMemory("No room on the device of the annotators") from error
        if isinstance(error, torch.AcceleratorError):
            raise WorkerLost(f"The accelerator of the annotators broke: {error}") from error
        raise


def _size_bytes(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    return sum(tensor.nbytes for tensor in (*value.parameters(), *value.buffers()))
