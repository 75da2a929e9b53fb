"""The cache of control maps: one making for all, a bound that holds, and nobody who waits for the dead."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from serve_app.annotators.cache import FOLDER, KEPT_S, Caching, MadeMap
from serve_app.annotators.map_index import MapIndex, ReadyMap
from serve_app.database import Database, control_maps
from serve_app.errors import JobError
from serve_app.images import encode_png
from serve_app.storage import ObjectInfo
from serve_app.storage.local import LocalStore
from support.maps import INFO, KEY, Detector, replica, rows


async def test_another_replica_finds_the_map(any_database: Database, objects: LocalStore) -> None:
    detector = Detector()
    first, second = replica(any_database, objects), replica(any_database, objects)
    made = [await one.cache.get(KEY, Caching.SHARED, detector) for one in (first, first, second, second)]
    assert detector.runs == 1
    assert all(np.array_equal(one.pixels, np.full((16, 16, 3), 7)) and one.info == INFO for one in made)
    assert first.outcomes() == {"made": 1, "memory": 1}
    assert second.outcomes() == {"shared": 1, "memory": 1}
    with pytest.raises(ValueError, match="read-only"):
        made[0].pixels[0, 0, 0] = 1


async def test_three_at_once_run_one_detector(any_database: Database, objects: LocalStore) -> None:
    detector = Detector()
    detector.hold.clear()
    replicas = [replica(any_database, objects) for _ in range(2)]
    asked = [asyncio.create_task(one.cache.get(KEY, Caching.SHARED, detector)) for one in (*replicas, replicas[0])]
    await detector.started.wait()
    await asyncio.sleep(0.3)
    detector.hold.set()
    maps = await asyncio.gather(*asked)
    assert detector.runs == 1
    assert all(np.array_equal(one.pixels, maps[0].pixels) for one in maps)


@pytest.mark.parametrize("caching", [Caching.MEMORY, Caching.SHARED])
async def test_an_error_reaches_all_who_wait_and_is_not_kept(
    database: Database, objects: LocalStore, caching: Caching
) -> None:
    detector = Detector(failure=JobError("no"))
    one = replica(database, objects)
    answers = await asyncio.gather(*(one.cache.get(KEY, caching, detector) for _ in range(3)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [JobError] * 3
    assert detector.runs == 1
    assert rows(database) == []
    detector.failure = None
    assert (await one.cache.get(KEY, caching, detector)).info == INFO


async def test_cheap_maps_stay_in_memory_and_cheaper_ones_nowhere(database: Database, objects: LocalStore) -> None:
    detector = Detector()
    one = replica(database, objects)
    for caching, runs in ((Caching.MEMORY, 1), (Caching.MEMORY, 1), (Caching.NONE, 2), (Caching.NONE, 3)):
        await one.cache.get(KEY, caching, detector)
        assert detector.runs == runs
    assert rows(database) == []


async def test_memory_is_bounded(database: Database, objects: LocalStore) -> None:
    size = 16 * 16 * 3
    one = replica(database, objects, memory=2 * size)
    detector = Detector()
    for key in ("a", "b", "a", "c"):
        await one.cache.get(key, Caching.MEMORY, detector)
    assert detector.runs == 3
    await one.cache.get("a", Caching.MEMORY, detector)  # used after b, so b made room for c
    assert detector.runs == 3
    await one.cache.get("b", Caching.MEMORY, detector)
    assert detector.runs == 4
    too_large = Detector(side=64)
    for _ in range(2):
        await one.cache.get("d", Caching.MEMORY, too_large)
    assert too_large.runs == 2


@dataclass
class CountingStore:
    """An ObjectStore in memory that knows how much it ever held."""

    held: dict[str, bytes] = field(default_factory=dict)
    most: int = 0

    def put(self, key: str, data: bytes, content_type: str) -> None:
        assert content_type == "image/png"
        self.held[key] = data
        self.most = max(self.most, sum(map(len, self.held.values())))

    def get(self, key: str) -> bytes:
        return self.held[key]

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self.held[key][start : end + 1]

    def info(self, key: str) -> ObjectInfo | None:
        return ObjectInfo(len(self.held[key]), "image/png", 0) if key in self.held else None

    def delete(self, key: str) -> None:
        self.held.pop(key, None)

    def delete_prefix(self, prefix: str) -> None:
        raise NotImplementedError(prefix)


@pytest.mark.parametrize("any_database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.full)], indirect=True)
async def test_many_images_stay_under_the_bound(any_database: Database) -> None:
    """Two replicas at once and 1,000 images on PostgreSQL; 250, five times what there is room for, and in turns on
    SQLite, where one would only wait for the other's lock."""
    at_once, count = (2, 1000) if any_database.dialect == "postgresql" else (1, 250)
    if at_once == 1:
        sa.event.listen(any_database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous = OFF"))
        any_database.engine.dispose()
    size = len(encode_png(np.full((16, 16, 3), 7, np.uint8)))
    budget = 50 * size + size // 2
    store = CountingStore()
    replicas = [replica(any_database, store, memory=0, shared=budget) for _ in range(2)]
    favourite = Detector()
    for first in range(0, count, at_once):
        numbers = range(first, first + at_once)
        made = [
            replicas[number % 2].cache.get(f"{number:064d}", Caching.SHARED, Detector(value=number % 256))
            for number in numbers
        ]
        await asyncio.gather(*made)
        if first % 10 == 0:
            await replicas[0].cache.get(KEY, Caching.SHARED, favourite)
    assert budget - 4 * size < store.most <= budget
    assert sum(map(len, store.held.values())) == MapIndex(any_database).total_bytes() <= budget
    assert favourite.runs == 1  # what is used stays


async def stored(database: Database, objects: LocalStore, *keys: str) -> None:
    """Maps of another replica, which is gone."""
    other = replica(database, objects)
    for key in keys:
        await other.cache.get(key, Caching.SHARED, Detector())
    await other.cache.close()


def age(database: Database, key: str) -> None:
    with database.transaction() as connection:
        aged = sa.update(control_maps).where(control_maps.c.key == key)
        connection.execute(aged.values(used_at=control_maps.c.used_at - KEPT_S - 1))


async def until_left(database: Database, keys: set[str]) -> None:
    """Wait for the sweep, which nobody else waits for."""
    async with asyncio.timeout(30):
        while {row.key for row in rows(database)} != keys:  # noqa: ASYNC110  - it happens in a thread
            await asyncio.sleep(0.01)


def sweeps() -> list[str]:
    """Tasks of this test's loop that sweep."""
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "map-sweep"]


async def test_what_nobody_uses_for_a_day_goes(any_database: Database, objects: LocalStore) -> None:
    old, used, new = ("b" * 64, "c" * 64, "d" * 64)
    await stored(any_database, objects, old, used)
    for key in (old, used):
        age(any_database, key)
    assert MapIndex(any_database).find(used) is not None  # that is a use
    await replica(any_database, objects).cache.get(new, Caching.SHARED, Detector())
    await until_left(any_database, {used, new})
    assert objects.info(f"{FOLDER}/bb/{old}.png") is None
    assert objects.info(f"{FOLDER}/cc/{used}.png") is not None


@pytest.mark.parametrize("last", ["found", "none are kept", "uncached"])
async def test_old_maps_go_though_none_is_made(database: Database, objects: LocalStore, last: str) -> None:
    old, used = "b" * 64, "c" * 64
    await stored(database, objects, old, used)
    age(database, old)
    one = replica(database, objects, shared=0 if last == "none are kept" else 2**20)
    await one.cache.get(used, Caching.NONE if last == "uncached" else Caching.SHARED, Detector())
    await until_left(database, {used})
    assert objects.info(f"{FOLDER}/bb/{old}.png") is None


class HeldStore(LocalStore):
    """Deletes nothing before the gate opens."""

    gate: threading.Event

    def delete(self, key: str) -> None:
        assert self.gate.wait(60)
        super().delete(key)


async def test_nobody_waits_for_the_sweep_but_who_closes(database: Database, tmp_path: Path) -> None:
    objects = HeldStore(tmp_path / "objects")
    objects.gate = threading.Event()
    old = "b" * 64
    await stored(database, objects, old)
    age(database, old)
    one = replica(database, objects)
    detector = Detector()
    for _ in range(2):
        await asyncio.wait_for(one.cache.get(KEY, Caching.SHARED, detector), 30)
    assert sweeps() == ["map-sweep"]
    closing = asyncio.create_task(one.cache.close())
    await asyncio.sleep(0.1)
    assert not closing.done()  # the database is still in use
    objects.gate.set()
    await closing
    assert {row.key for row in rows(database)} == {KEY}
    await one.cache.get(KEY, Caching.SHARED, detector)
    assert sweeps() == []


async def test_what_exceeds_the_bound_alone_is_not_kept(database: Database, objects: LocalStore) -> None:
    detector = Detector()
    one = replica(database, objects, memory=0, shared=10)
    for _ in range(2):
        assert (await one.cache.get(KEY, Caching.SHARED, detector)).info == INFO
    assert detector.runs == 2
    assert rows(database) == []


@pytest.mark.parametrize("harm", ["missing", "damaged"])
async def test_a_bad_object_is_made_again(database: Database, objects: LocalStore, harm: str) -> None:
    detector = Detector()
    await replica(database, objects).cache.get(KEY, Caching.SHARED, detector)
    key = f"{FOLDER}/aa/{KEY}.png"
    if harm == "missing":
        objects.delete(key)
    else:
        objects.put(key, encode_png(np.zeros((16, 16, 3), np.uint8)), "image/png")
    for _ in range(2):
        made = await replica(database, objects).cache.get(KEY, Caching.SHARED, detector)
        assert made.pixels.max() == 7
    assert detector.runs == 2


async def test_a_map_of_which_nothing_is_known_is_made_again(database: Database, objects: LocalStore) -> None:
    detector = Detector()
    await replica(database, objects).cache.get(KEY, Caching.SHARED, detector)
    with database.transaction() as connection:
        connection.execute(sa.update(control_maps).values(info='{"of_another_version": 1}'))
    for _ in range(2):
        assert (await replica(database, objects).cache.get(KEY, Caching.SHARED, detector)).info == INFO
    assert detector.runs == 2


async def test_without_a_database_maps_are_made(database: Database, objects: LocalStore) -> None:
    with database.transaction() as connection:
        control_maps.drop(connection)
    detector = Detector()
    assert (await replica(database, objects).cache.get(KEY, Caching.SHARED, detector)).pixels.max() == 7
    assert detector.runs == 1


async def test_without_a_store_maps_are_made(database: Database, tmp_path: Path) -> None:
    objects = LocalStore(tmp_path / "objects")
    (tmp_path / "objects" / FOLDER).write_text("in the way")
    detector = Detector()
    for one in (replica(database, objects), replica(database, objects)):
        assert (await one.cache.get(KEY, Caching.SHARED, detector)).pixels.max() == 7
    assert detector.runs == 2  # neither waited for the other's lease
    assert rows(database) == []


class Crash(BaseException):
    """The process ends here, as far as the cache can tell."""


@pytest.mark.parametrize("moment", ["put", "delete"])
def test_what_a_crash_leaves_counts_and_goes(database: Database, moment: str) -> None:
    """Before the row of a new object is ready, or after a row was taken back and before its object is gone."""
    index, store = MapIndex(database), CountingStore()

    def add(key: str, budget: int, crash: str = "") -> None:
        assert index.claim(key, key, 0.01)
        while (gone := index.reserve(key, key, 100, budget, 0.01)) is not None:
            if crash == "delete":
                raise Crash
            for old in gone:
                store.delete(old)
            index.drop(key, *gone)
        store.put(key, bytes(100), "image/png")
        if crash == "put":
            raise Crash
        assert index.publish(key, key, ReadyMap("{}", "0"))

    add("one", 250)
    add("two", 250)
    with pytest.raises(Crash):
        add("three", 250, crash=moment)
    time.sleep(0.05)
    assert sum(map(len, store.held.values())) <= index.total_bytes()
    for key in ("four", "five", "six"):
        add(key, 250)
        assert sum(map(len, store.held.values())) <= 250
    assert set(store.held) == {"five", "six"}
    assert {row.key for row in rows(database)} == set(store.held)


def test_a_holder_that_stood_still_changes_nothing(any_database: Database) -> None:
    index = MapIndex(any_database)
    assert index.claim(KEY, "slow", 0.01)
    assert not index.claim("b", "slow", 5) or not index.claim("b", "other", 5)
    time.sleep(0.05)
    assert index.claim(KEY, "quick", 5)
    assert not index.renew(KEY, "slow", 5)
    assert not index.publish(KEY, "slow", ReadyMap("{}", "0"))
    with pytest.raises(KeyError):
        index.reserve(KEY, "slow", 1, 100, 5)
    index.drop("slow", KEY)
    assert index.publish(KEY, "quick", ReadyMap("{}", "1"))
    assert index.find(KEY) == ReadyMap("{}", "1")


def make_for_ever(url: str, folder: Path, started: Any) -> None:
    async def hang(begin: Callable[[], None]) -> MadeMap:
        begin()
        started.set()
        await asyncio.sleep(600)
        raise AssertionError

    database = Database(url)
    asyncio.run(replica(database, LocalStore(folder), lease_s=0.9).cache.get(KEY, Caching.SHARED, hang))


@pytest.mark.parametrize("any_database", ["sqlite", pytest.param("postgresql", marks=pytest.mark.full)], indirect=True)
async def test_a_killed_replica_blocks_nobody(any_database: Database, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    url = any_database.engine.url.render_as_string(hide_password=False)
    child = context.Process(target=make_for_ever, args=(url, tmp_path / "objects", started))
    child.start()
    detector = Detector()
    try:
        assert await asyncio.to_thread(started.wait, 60)
        one = replica(any_database, LocalStore(tmp_path / "objects"))
        waiting = asyncio.create_task(one.cache.get(KEY, Caching.SHARED, detector))
        # Longer than the lease: as long as it lives, it renews it.
        await asyncio.sleep(1.5)
        assert detector.runs == 0
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        assert (await asyncio.wait_for(waiting, 30)).pixels.max() == 7
        assert detector.runs == 1
    finally:
        child.kill()
        child.join()
