"""Replicas of the cache of control maps, and a detector that makes one when it is told to."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa

from serve_app.annotators.cache import MadeMap, MapCache
from serve_app.annotators.map_index import MapIndex
from serve_app.database import Database, control_maps
from serve_app.metrics import PrometheusMeter
from serve_app.storage import ObjectStore
from serve_app.tasks import AnnotationInfo

KEY = "a" * 64
INFO = AnnotationInfo(control_type="depth", annotator="zoe", params={"size": 384})


@dataclass
class Detector:
    """Makes a map whose pixels are ``value``; counts its runs."""

    value: int = 7
    side: int = 16
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Exception | None = None
    runs: int = 0

    def __post_init__(self) -> None:
        self.hold.set()

    async def __call__(self, begin: Callable[[], None]) -> MadeMap:
        async with self.turn:
            begin()
            self.runs += 1
            self.started.set()
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        return MadeMap(np.full((self.side, self.side, 3), self.value, np.uint8), INFO)


@dataclass
class Replica:
    cache: MapCache
    meter: PrometheusMeter

    def outcomes(self) -> dict[str, float]:
        (family,) = [one for one in self.meter.registry.collect() if one.name == "controlnet_map_cache"]
        return {item.labels["outcome"]: item.value for item in family.samples if item.name.endswith("_total")}


def replica(
    database: Database, objects: ObjectStore, memory: int = 2**20, shared: int = 2**20, lease_s: float = 5.0
) -> Replica:
    meter = PrometheusMeter()
    index = MapIndex(database)
    return Replica(MapCache(index, objects, meter, memory_bytes=memory, shared_bytes=shared, lease_s=lease_s), meter)


def rows(database: Database) -> list[Any]:
    with database.read() as connection:
        return list(connection.execute(sa.select(control_maps)))
