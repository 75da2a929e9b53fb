"""AnnotatorService: what an annotator replica holds. Loaded detectors, the cache of maps, and where maps are stored.

Threads: annotators without weights run in the event loop's own pool, for milliseconds. Those with networks run one at
a time, because each takes all the threads that torch may use in this process (``AnnotatorConfig.threads``), or the GPU;
more at once would only wait for each other and take the memory of all.
"""

import asyncio
import base64
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final

import numpy as np

from serve_app.annotators import ANNOTATORS, annotate, chosen_annotator
from serve_app.annotators.cache import Caching, MadeMap, MapCache, map_key
from serve_app.annotators.detectors import DetectorHost
from serve_app.annotators.identity import Identities, Identity
from serve_app.annotators.map_index import MapIndex
from serve_app.annotators.weights import WeightStore
from serve_app.backend import AnnotatorStats
from serve_app.config import AnnotatorConfig, AppConfig
from serve_app.database import Database
from serve_app.errors import JobError, RetryableError
from serve_app.images import Pixels, encode_png
from serve_app.metrics import Meter
from serve_app.storage import ObjectStore
from serve_app.tasks import AnnotationInfo, AnnotationTask, ControlMap, ImageArray, MapOutput

MEMORY_BYTES: Final = 64 * 1024**2
"""Control maps kept in the memory of one replica: 80 of 512 x 512."""

SENT: Final = "none"
"""The annotator of a map that came with the request."""

_UNCACHED: Final = frozenset({"tile", "inpaint", "invert"})
"""At most 1 ms, or, for inpaint, a map that no picture file can hold."""

_DISK_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


class _OtherWeightsError(Exception):
    """The weights were replaced after the key was made of them: the map would be another's."""


def open_annotators(config: AppConfig, database: Database, objects: ObjectStore, meter: Meter) -> "AnnotatorService":
    """The service of this process as configured. Nothing is loaded before it is used."""
    return AnnotatorService(config.annotator, WeightStore(config.annotator_weights), database, objects, meter)


class AnnotatorService:
    """One per process; ``annotate`` belongs to one event loop. See ``serve_app.backend.Backend.annotate``."""

    def __init__(
        self, config: AnnotatorConfig, weights: WeightStore, database: Database, objects: ObjectStore, meter: Meter
    ) -> None:
        self._host = DetectorHost(weights, config.device, config.detector_memory_bytes)
        self._objects = objects
        self._meter = meter
        self._cache = MapCache(
            MapIndex(database),
            objects,
            meter,
            memory_bytes=MEMORY_BYTES,
            shared_bytes=config.map_store_bytes,
        )
        self._networks = ThreadPoolExecutor(1, thread_name_prefix="detector")
        self._turn = asyncio.Lock()
        """Calls wait here and not in the pool, whose queue would keep the pictures of those that were cancelled."""
        self._identities = Identities(self._host)
        self.calls = 0
        """Maps handed out."""
        self.runs = 0
        """Maps really made."""

    def start(self) -> None:
        """Begin what is done beside the calls; the first call does it too. In the event loop of ``annotate``."""
        self._cache.start()

    async def annotate(
        self, task: AnnotationTask, image: ImageArray, mask: ImageArray | None, output: MapOutput | None
    ) -> tuple[ControlMap, AnnotationInfo]:
        """The map, read-only, and what is known of it."""
        made = await self._map(task, image, mask)
        if output is not None:
            storing = asyncio.ensure_future(asyncio.to_thread(self._store, output, made))
            try:
                await asyncio.shield(storing)
            except asyncio.CancelledError:
                await asyncio.wait([storing])  # whoever cancels deletes the attempt's files: none may appear later
                raise
        self.calls += 1
        self._meter.count("annotations", control_type=task.control_type)
        # Another control type may have asked for this map first.
        return made.pixels, made.info.model_copy(update={"control_type": task.control_type})

    def stats(self, replica: str, node: str) -> AnnotatorStats:
        """A snapshot under these names. Looks which weights are there: call it in a thread."""
        lacking = {name: filter(None, map(self._host.problem, row.networks)) for name, row in ANNOTATORS.items()}
        return AnnotatorStats(
            replica=replica,
            node=node,
            pid=os.getpid(),
            annotate_calls=self.calls,
            annotator_runs=self.runs,
            missing={name: reason for name, problems in lacking.items() if (reason := "; ".join(problems))},
        )

    async def close(self) -> None:
        await self._cache.close()
        await asyncio.to_thread(self._networks.shutdown)

    async def _map(self, task: AnnotationTask, image: ImageArray, mask: ImageArray | None) -> MadeMap:
        name = chosen_annotator(task.control_type, task.annotator, task.auto_hint)
        networks = ANNOTATORS[name].networks if name is not None else ()

        async def make(begin: Callable[[], None], identity: Identity | None = None) -> MadeMap:
            def work() -> MadeMap:
                begin()
                with self._host.lease(networks):  # from here on they stay
                    if identity is not None and self._host.files(networks) != identity.files:
                        raise _OtherWeightsError
                    return self._make(task, image, mask)

            loop = asyncio.get_running_loop()
            if not networks:
                return await loop.run_in_executor(None, work)
            async with self._turn:
                return await loop.run_in_executor(self._networks, work)

        if name is None or name in _UNCACHED:
            return await self._cache.get("", Caching.NONE, make)
        params = ANNOTATORS[name].read(task.params)
        identity = await asyncio.to_thread(self._identities.of, name)
        if identity is None:
            return await self._cache.get("", Caching.NONE, make)
        key = await asyncio.to_thread(map_key, task, name, params, identity.digest, image, mask)
        caching = Caching.SHARED if networks else Caching.MEMORY
        try:
            return await self._cache.get(key, caching, partial(make, identity=identity))
        except _OtherWeightsError:
            return await self._cache.get("", Caching.NONE, make)

    def _make(self, task: AnnotationTask, image: ImageArray, mask: ImageArray | None) -> MadeMap:
        started = time.monotonic()
        pixels, info = annotate(task, image, mask, self._host)
        if info.annotator != SENT:
            self.runs += 1
            self._meter.count("annotator_runs", annotator=info.annotator)
            self._meter.observe("annotator_seconds", time.monotonic() - started, annotator=info.annotator)
        return MadeMap(pixels, info)

    def _store(self, output: MapOutput, made: MadeMap) -> None:
        """Raises JobError: the disk is full; RetryableError: the store cannot be used."""
        png = made.png or encode_png(_shown(made.pixels))
        try:
            if output.base64_text:
                self._objects.put(output.key, base64.b64encode(png), "text/plain")
            else:
                self._objects.put(output.key, png, "image/png")
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise JobError("The server has no space left to store the control map.") from error
            raise RetryableError(f"The control map could not be stored: {error}") from error


def _shown(control_map: ControlMap) -> Pixels:
    """A map as a picture can hold it: of the inpaint net's float maps, masked pixels are black."""
    if control_map.dtype == np.uint8:
        return control_map
    return np.rint(control_map.clip(0, 1) * 255).astype(np.uint8)
