"""Loaded components, within a budget of bytes: leased to requests, least recently used gone first.

A component is pinned while anybody holds a lease on it. Loading happens in a thread of its own and once for all who
wait for it, so neither the event loop nor running requests notice. Knows nothing of engines.
"""

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import DenoiserConfig
from serve_app.errors import ConfigError, RetryableError, WorkerBusy, one_of
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.models.devices import pick_device
from serve_app.models.loading import load_base, load_net

logger = logging.getLogger(__name__)

T = TypeVar("T")
Component = BaseComponents | NetComponents

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Lease(Generic[T]):
    """The right to use a component. ``release`` it, or leave the ``with`` block, from any thread."""

    def __init__(self, value: T, unpin: Callable[[], None]) -> None:
        self.value = value
        self._unpin = unpin
        self._lock = threading.Lock()
        self._released = False

    def release(self) -> None:
        """Give the component back; more than once does no harm."""
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._unpin()

    def __enter__(self) -> T:
        return self.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(eq=False, slots=True)
class _Slot:
    """A component that is loaded or being loaded. Changed under the cache's lock only."""

    entry: ModelEntry
    future: "Future[Component]"
    pins: int = 0
    last_used: int = 0
    size_bytes: int = 0
    """0 until loaded."""

    def is_of(self, entry: ModelEntry) -> bool:
        return (self.entry.type, self.entry.family, self.entry.hash) == (entry.type, entry.family, entry.hash)


class ComponentCache:
    """One per device. Coroutines of one event loop or of several ask for leases; any thread may release them.

    ``budget_bytes`` bounds what is loaded, save that leased components stay: together they may exceed it.
    """

    def __init__(self, catalog: Catalog, device: torch.device, dtype: torch.dtype, budget_bytes: int) -> None:
        self.device = device
        self.dtype = dtype
        self._catalog = catalog
        self._budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self._slots: dict[str, _Slot] = {}
        self._stale: list[_Slot] = []  # pinned, but the catalogue says something else by now
        self._uses = 0
        self._closed = False
        # One thread: loads share the disk and the link to the device, and the libraries load one at a time anyway.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-model")

    async def base(self, id: str) -> Lease[BaseComponents]:  # noqa: A002  - as in the catalogue
        """A lease on the base model that the catalogue lists under ``id`` now, loaded first where necessary.

        Raises:
            ModelError: it is unknown, or can't be loaded (see ``loading.load_base``).
            OutOfMemory: there is no room for it on the device.
            WorkerLost: the device broke while it was loaded.
            WorkerBusy: the cache is closed.
            RetryableError: the catalogue or the files can't be read at the moment.
        """
        return await self._lease(id, ModelType.BASE)

    async def net(self, id: str) -> Lease[NetComponents]:  # noqa: A002  - as in the catalogue
        """A lease on a ControlNet; otherwise as ``base``."""
        return await self._lease(id, ModelType.CONTROLNET)

    def loaded(self) -> tuple[str, ...]:
        """Ids of what is in memory, least recently used first."""
        with self._lock:
            return tuple(slot.entry.id for slot in self._by_age())

    @property
    def loaded_bytes(self) -> int:
        """What is in memory, replaced components that are still leased included."""
        with self._lock:
            return sum(slot.size_bytes for slot in (*self._slots.values(), *self._stale))

    def release_unused(self) -> None:
        """Give up every component that nobody holds, for the device ran out of memory. From any thread.

        What torch keeps of it goes back to the device: cuBLAS and cuDNN allocate outside torch's pool.
        """
        with self._lock:
            self._drop_unused(0)
        gc.collect()  # modules are full of cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Take no more requests and wait for the loads that are under way. Leases stay valid."""
        with self._lock:
            self._closed = True
        self._loader.shutdown()

    async def _lease(self, id: str, kind: ModelType) -> Lease[Any]:  # noqa: A002
        try:
            entry = await asyncio.to_thread(self._catalog.get, id, kind)
        except SQLAlchemyError as error:
            raise RetryableError(f"The catalogue cannot be read now: {type(error).__name__}") from error
        slot = self._pin(entry)
        try:
            # Shielded: one waiter that gives up must not take the load from the others.
            value = await asyncio.shield(asyncio.wrap_future(slot.future))
        except BaseException:
            self._unpin(slot)
            raise
        return Lease(value, lambda: self._unpin(slot))

    def _pin(self, entry: ModelEntry) -> _Slot:
        """The slot of ``entry``, pinned; a new one, on its way into memory, where there is none of this hash."""
        with self._lock:
            if self._closed:
                raise WorkerBusy("The worker is shutting down.")
            slot = self._slots.get(entry.id)
            if slot is not None and not slot.is_of(entry):
                self._replace(slot)
                slot = None
            if slot is None:
                slot = _Slot(entry, Future())
                slot.future.set_running_or_notify_cancel()  # from here on no waiter can cancel it
                self._slots[entry.id] = slot
                self._loader.submit(self._load, slot)
            self._uses += 1
            slot.last_used = self._uses
            slot.pins += 1
            return slot

    def _unpin(self, slot: _Slot) -> None:
        with self._lock:
            slot.pins -= 1
            if slot.pins == 0:
                if slot in self._stale:
                    self._stale.remove(slot)
                self._make_room(0)

    def _replace(self, slot: _Slot) -> None:
        del self._slots[slot.entry.id]
        if slot.pins:
            self._stale.append(slot)

    def _load(self, slot: _Slot) -> None:
        """In the loader's thread. A slot that fails is forgotten before its waiters hear of it, so they may retry."""
        entry = slot.entry
        load: Callable[..., Component] = load_base if entry.type is ModelType.BASE else load_net
        started = time.monotonic()
        try:
            with self._lock:
                self._make_room(entry.size_bytes)
            value = load(entry, self.device, self.dtype)
        except BaseException as error:  # noqa: BLE001  - handed to the waiters, whatever it is
            with self._lock:
                if self._slots.get(entry.id) is slot:
                    del self._slots[entry.id]
            slot.future.set_exception(error)
            return
        with self._lock:
            slot.size_bytes = value.size_bytes
            self._make_room(0)
        logger.info("loaded %s, %d bytes, in %.2f s", entry.id, value.size_bytes, time.monotonic() - started)
        slot.future.set_result(value)

    def _make_room(self, wanted_bytes: int) -> None:
        """Drop components that nobody holds, the least recently used first, until ``wanted_bytes`` more would fit."""
        self._drop_unused(self._budget_bytes - wanted_bytes)

    def _drop_unused(self, bound_bytes: int) -> None:
        for slot in self._by_age():
            if self.loaded_bytes <= bound_bytes:
                return
            if slot.pins == 0:
                del self._slots[slot.entry.id]
                logger.info("dropped %s, %d bytes", slot.entry.id, slot.size_bytes)

    def _by_age(self) -> list[_Slot]:
        loaded = (slot for slot in self._slots.values() if slot.size_bytes)
        return sorted(loaded, key=lambda slot: slot.last_used)


def open_cache(config: DenoiserConfig, catalog: Catalog) -> ComponentCache:
    """The cache of one denoiser, on the device and in the dtype it is configured for.

    Raises:
        ConfigError: there is no such device or dtype here.
    """
    device = pick_device(config.device)
    return ComponentCache(catalog, device, pick_dtype(config.dtype, device), config.model_memory_bytes)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of ``DenoiserConfig.dtype``: ``auto`` is float16 on a GPU, else float32.

    Raises:
        ConfigError: the name is unknown.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise ConfigError(one_of("dtype", name, ("auto", *_DTYPES)))
    return _DTYPES[name]
