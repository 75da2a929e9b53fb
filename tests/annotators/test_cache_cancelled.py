"""Callers of the cache who go: what has begun is kept, what has not is given up, and no lease is left behind."""

import asyncio
import threading

import pytest

from serve_app.annotators.cache import Caching
from serve_app.annotators.map_index import MapIndex
from serve_app.database import Database
from serve_app.storage.local import LocalStore
from support.maps import INFO, KEY, Detector, replica, rows


async def test_the_first_may_hang_up(database: Database, objects: LocalStore) -> None:
    detector = Detector()
    detector.hold.clear()
    one = replica(database, objects)
    first, second = (asyncio.create_task(one.cache.get(KEY, Caching.SHARED, detector)) for _ in range(2))
    await detector.started.wait()
    first.cancel()
    detector.hold.set()
    assert (await second).info == INFO
    assert detector.runs == 1
    assert one.outcomes() == {"made": 1, "joined": 1}


@pytest.mark.parametrize("caching", [Caching.MEMORY, Caching.SHARED])
async def test_what_nobody_waits_for_is_not_begun(database: Database, objects: LocalStore, caching: Caching) -> None:
    detector = Detector()
    one = replica(database, objects)
    async with detector.turn:
        waiting = [asyncio.create_task(one.cache.get(key, caching, detector)) for key in ("a", "a", "b", "c")]
        await asyncio.sleep(0.2)
        for task in (waiting[0], *waiting[2:]):
            task.cancel()
        await asyncio.wait([waiting[0], *waiting[2:]])
        again = asyncio.create_task(one.cache.get("c", caching, detector))  # while the first one is being given up
        await asyncio.sleep(0.2)
    assert [(await task).info for task in (waiting[1], again)] == [INFO, INFO]
    await one.cache.close()
    assert detector.runs == 2
    assert {row.key for row in rows(database)} == ({"a", "c"} if caching is Caching.SHARED else set())


async def test_what_has_begun_is_kept_though_nobody_waits(database: Database, objects: LocalStore) -> None:
    detector = Detector()
    detector.hold.clear()
    one = replica(database, objects)
    only = asyncio.create_task(one.cache.get(KEY, Caching.SHARED, detector))
    await detector.started.wait()
    only.cancel()
    await asyncio.wait([only])
    detector.hold.set()
    assert (await one.cache.get(KEY, Caching.SHARED, detector)).info == INFO
    assert detector.runs == 1


async def test_a_caller_who_leaves_while_the_lease_is_asked_for_leaves_none(
    database: Database, objects: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = threading.Event(), threading.Event()
    claim = MapIndex.claim

    def slow(index: MapIndex, key: str, holder: str, lease_s: float) -> bool:
        asked.set()
        assert answer.wait(30)
        return claim(index, key, holder, lease_s)

    monkeypatch.setattr(MapIndex, "claim", slow)
    one, detector = replica(database, objects), Detector()
    task = asyncio.create_task(one.cache.get(KEY, Caching.SHARED, detector))
    assert await asyncio.to_thread(asked.wait, 30)
    task.cancel()
    await asyncio.wait([task])
    answer.set()
    await one.cache.close()
    assert (detector.runs, rows(database)) == (0, [])
