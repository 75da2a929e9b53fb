"""MapCache: control maps that were made before, in this process's memory and in the store that all replicas share.

A map is made once for all who ask for it at the same time: in one process because they await one task, between
processes because the one that makes it holds a lease in the database (``MapIndex``) and renews it. When that process
dies, its lease runs out and another makes the map. The cache never decides whether there is a map: without its
database or its store, maps are simply made.
"""

import asyncio
import hashlib
import io
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Final

import numpy as np
from PIL import Image
from sqlalchemy.exc import SQLAlchemyError

from serve_app.annotators.map_index import MapIndex, ReadyMap
from serve_app.images import encode_png
from serve_app.metrics import Meter
from serve_app.storage import ObjectStore
from serve_app.tasks import AnnotationInfo, AnnotationTask, ControlMap, ImageArray, JsonScalar

logger = logging.getLogger(__name__)

FOLDER: Final = "maps"
"""Where the maps lie in the object store."""

_TROUBLE = (SQLAlchemyError, OSError)
_FORMAT: Final = 2
"""Raise it when what a key stands for changes."""

KEPT_S: Final = 24 * 3600.0
"""A map that nobody uses for so long is deleted, however much room there is: it shows somebody's photo."""
_SWEEP_EVERY_S: Final = 3600.0

_PATIENCE_S: Final = 300.0
"""How long a replica waits for another's map before it makes its own."""


class Caching(StrEnum):
    """How far the maps of an annotator are kept."""

    NONE = "none"
    """Making one costs no more than looking for it."""
    MEMORY = "memory"
    """One takes 5 to 25 ms at 512 x 512: less than storing it does (25 to 75 ms), more than the key (1 ms)."""
    SHARED = "shared"
    """One takes a network: 0.4 to 30 s on a CPU."""


@dataclass(frozen=True, slots=True)
class MadeMap:
    """A control map, (H, W, 3), read-only, and what is known of it."""

    pixels: ControlMap
    info: AnnotationInfo
    png: bytes | None = None
    """The map as a file, where it has been one already."""


Make = Callable[[Callable[[], None]], Awaitable[MadeMap]]
"""Makes the map; calls what it gets, from any thread, when it begins to work and no longer only waits its turn."""
_Bound = Callable[[], Awaitable[MadeMap]]


@dataclass(eq=False, slots=True)
class _Making:
    """A map that is being made or waits for its turn. Changed in the event loop, save ``begun``."""

    waiters: int = 0
    begun: bool = False

    def begin(self) -> None:
        self.begun = True


def map_key(
    task: AnnotationTask,
    annotator: str,
    params: Mapping[str, JsonScalar],
    identity: str,
    image: ImageArray,
    mask: ImageArray | None,
) -> str:
    """A hash of everything that the map follows from, 64 hex digits.

    The control type is not part of it: HED draws the same edges for ``hed`` and for ``softedge``. ``annotator`` and
    ``params`` are the effective ones; ``identity`` stands for the detector's code and weights.
    """
    shapes = [image.shape, None if mask is None else mask.shape]
    head = [_FORMAT, annotator, task.width, task.height, task.seed, sorted(params.items()), shapes]
    key = hashlib.sha256(json.dumps([*head, identity]).encode())
    for pixels in (image, mask):
        if pixels is not None:
            key.update(np.ascontiguousarray(pixels).data)
    return key.hexdigest()


class MapCache:
    """One per process; ``get`` belongs to one event loop.

    ``memory_bytes`` bounds the pixels kept here, ``shared_bytes`` what all replicas together keep in the object store;
    0 switches that part off.
    """

    def __init__(
        self,
        index: MapIndex,
        objects: ObjectStore,
        meter: Meter,
        *,
        memory_bytes: int,
        shared_bytes: int,
        lease_s: float = 10.0,
    ) -> None:
        self._index = index
        self._objects = objects
        self._meter = meter
        self._memory = _Memory(memory_bytes)
        self._shared_bytes = shared_bytes
        self._lease_s = lease_s
        self._sweeping: asyncio.Task[None] | None = None
        self._closed = False
        self._making: dict[str, tuple[_Making, asyncio.Task[MadeMap]]] = {}
        self._tasks: set[asyncio.Task[MadeMap]] = set()

    async def get(self, key: str, caching: Caching, make: Make) -> MadeMap:
        """The map of ``key``, made by ``make`` if nobody has it or makes it already.

        A caller that is cancelled disturbs nobody: a map that has been begun is finished, for the others and for later.
        One that still waits for its turn is given up when its last caller goes, or cancelled work would pile up.

        Raises:
            What ``make`` raises, to all who wait for it in this process.
        """
        self.start()
        if caching is Caching.NONE:
            self._tell("off")
            return _read_only(await make(lambda: None))
        known = self._memory.get(key)
        if known is not None:
            self._tell("memory")
            return known
        if key in self._making:
            self._tell("joined")
        making, task = self._making.get(key) or self._start(key, caching, make)
        making.waiters += 1
        try:
            return await asyncio.shield(task)
        finally:
            making.waiters -= 1
            if not (making.waiters or making.begun or task.done()):
                self._forget(key, task)
                task.cancel()

    def start(self) -> None:
        """Delete old maps from now on, now and then, beside all else. ``get`` does it too; twice is once."""
        if self._sweeping is None and not self._closed:
            self._sweeping = asyncio.create_task(self._sweep_now_and_then(), name="map-sweep")

    async def close(self) -> None:
        """Wait for the maps that are being made, and delete no more."""
        self._closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait((self._sweeping,))
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _start(self, key: str, caching: Caching, make: Make) -> tuple[_Making, asyncio.Task[MadeMap]]:
        making = _Making()
        task = asyncio.create_task(self._obtain(key, caching, partial(make, making.begin)), name=f"map-{key[:8]}")
        self._making[key] = making, task
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._made(key, done))
        return making, task

    def _made(self, key: str, task: asyncio.Task[MadeMap]) -> None:
        self._tasks.discard(task)
        self._forget(key, task)
        if not task.cancelled():
            task.exception()  # retrieved here: nobody may be left to await it

    def _forget(self, key: str, task: asyncio.Task[MadeMap]) -> None:
        """Whoever asks next starts anew. One who did so while ``task`` was being cancelled is left alone."""
        if key in self._making and self._making[key][1] is task:
            del self._making[key]

    async def _obtain(self, key: str, caching: Caching, make: _Bound) -> MadeMap:
        if caching is Caching.SHARED and self._shared_bytes > 0:
            made = await self._from_store(key, make)
        else:
            self._tell("made")
            made = await make()
        made = _read_only(made)
        self._memory.put(key, made)
        return made

    async def _from_store(self, key: str, make: _Bound) -> MadeMap:
        holder = uuid.uuid4().hex
        deadline = time.monotonic() + _PATIENCE_S
        pause_s = 0.05
        try:
            while time.monotonic() < deadline:
                found = await asyncio.to_thread(self._read, key, holder)
                if found is not None:
                    self._tell("shared")
                    return found
                if await self._claim(key, holder):
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(0.5, pause_s * 1.5)
            else:
                self._tell("made")
                return await make()
        except _TROUBLE:
            logger.warning("the cache of control maps cannot be used; making the map", exc_info=True)
            self._tell("made")
            return await make()
        self._tell("made")
        return await self._make_held(key, holder, make)

    async def _claim(self, key: str, holder: str) -> bool:
        claiming = asyncio.ensure_future(asyncio.to_thread(self._index.claim, key, holder, self._lease_s))
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            await asyncio.gather(claiming, return_exceptions=True)  # its thread can't be stopped and may yet get it
            await asyncio.to_thread(self._let_go, key, holder)
            raise

    def _read(self, key: str, holder: str) -> MadeMap | None:
        """The map from the store. One of no use, whose object is gone or damaged for instance, is forgotten."""
        ready = self._index.find(key)
        if ready is None:
            return None
        try:
            data = self._objects.get(_object(key))
        except KeyError:
            data = b""
        if hashlib.sha256(data).hexdigest() == ready.digest:
            try:
                info = AnnotationInfo.model_validate_json(ready.info)
            except ValueError:  # written by a version whose maps say other things
                logger.warning("what is known of the stored control map %s does not fit this version", key)
            else:
                return MadeMap(np.asarray(Image.open(io.BytesIO(data))), info, data)
        logger.warning("the stored control map %s is of no use; it is made again", key)
        if self._index.hold(key, holder, ready, self._lease_s):
            self._objects.delete(_object(key))
            self._index.drop(holder, key)
        return None

    async def _make_held(self, key: str, holder: str, make: _Bound) -> MadeMap:
        renewing = asyncio.create_task(self._renew(key, holder), name=f"map-lease-{key[:8]}")
        try:
            made = await make()
            return await asyncio.to_thread(self._store, key, holder, made)
        except BaseException:
            await asyncio.to_thread(self._let_go, key, holder)
            raise
        finally:
            renewing.cancel()

    async def _renew(self, key: str, holder: str) -> None:
        held = True
        while held:
            await asyncio.sleep(self._lease_s / 3)
            try:
                held = await asyncio.to_thread(self._index.renew, key, holder, self._lease_s)
            except SQLAlchemyError:
                logger.warning("a lease on a control map could not be renewed", exc_info=True)

    def _store(self, key: str, holder: str, made: MadeMap) -> MadeMap:
        """Share a map that was made under a lease. Whatever goes wrong, the map itself is good."""
        png = made.png or encode_png(made.pixels)
        made = replace(made, png=png)
        try:
            while (gone := self._reserve(key, holder, len(png))) is not None:
                self._delete(holder, gone)
            self._objects.put(_object(key), png, "image/png")
            ready = ReadyMap(made.info.model_dump_json(), hashlib.sha256(png).hexdigest())
            if not self._index.publish(key, holder, ready) and not self._index.known(key):
                self._objects.delete(_object(key))  # this process stood still, and others have cleaned up behind it
            self._meter.set("map_cache_bytes", self._index.total_bytes())
        except KeyError:
            self._let_go(key, holder)  # no room
        except _TROUBLE:
            logger.warning("a control map could not be shared", exc_info=True)
            self._let_go(key, holder)
        return made

    async def _sweep_now_and_then(self) -> None:
        while True:
            sweep = asyncio.ensure_future(asyncio.to_thread(self._sweep))
            try:
                await asyncio.shield(sweep)
            except asyncio.CancelledError:
                await asyncio.wait([sweep])  # its thread can't be stopped, and who closes takes the database away
                raise
            await asyncio.sleep(_SWEEP_EVERY_S)

    def _sweep(self) -> None:
        """Delete what nobody uses any more, of all replicas. Maps that are only found, or no longer kept, age too."""
        holder = uuid.uuid4().hex
        try:
            while not self._closed and (gone := self._index.take_old(holder, KEPT_S, self._lease_s)):
                self._delete(holder, gone)
            self._meter.set("map_cache_bytes", self._index.total_bytes())
        except _TROUBLE:
            logger.warning("old control maps could not be deleted", exc_info=True)

    def _delete(self, holder: str, keys: tuple[str, ...]) -> None:
        """Objects first: what has a row is counted."""
        for key in keys:
            self._objects.delete(_object(key))
        self._index.drop(holder, *keys)

    def _reserve(self, key: str, holder: str, size_bytes: int) -> tuple[str, ...] | None:
        return self._index.reserve(key, holder, size_bytes, self._shared_bytes, self._lease_s)

    def _let_go(self, key: str, holder: str) -> None:
        """Give a lease back, so that whoever waits need not wait for its end."""
        try:
            if self._index.renew(key, holder, self._lease_s):
                self._objects.delete(_object(key))
                self._index.drop(holder, key)
        except _TROUBLE:
            logger.warning("a lease on a control map is left to run out", exc_info=True)

    def _tell(self, outcome: str) -> None:
        self._meter.count("map_cache", outcome=outcome)


class _Memory:
    """Maps by key, least recently used out first, within a budget of bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._maps: OrderedDict[str, MadeMap] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> MadeMap | None:
        with self._lock:
            if key in self._maps:
                self._maps.move_to_end(key)
            return self._maps.get(key)

    def put(self, key: str, made: MadeMap) -> None:
        kept = replace(made, png=None)
        with self._lock:
            if key in self._maps or kept.pixels.nbytes > self._budget_bytes:
                return
            self._maps[key] = kept
            self._bytes += kept.pixels.nbytes
            while self._bytes > self._budget_bytes:
                _, oldest = self._maps.popitem(last=False)
                self._bytes -= oldest.pixels.nbytes


def _object(key: str) -> str:
    return f"{FOLDER}/{key[:2]}/{key}.png"


def _read_only(made: MadeMap) -> MadeMap:
    """The same pixels, for several users, or the request's own picture: nobody may write into them."""
    view = made.pixels.view()
    view.flags.writeable = False
    return replace(made, pixels=view)
