import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import torch

from serve_app.config import ModelSource
from serve_app.database import Database
from serve_app.errors import ConfigError, ModelLoadFailed, RetryableError, UnknownModel, WorkerBusy
from serve_app.models.cache import ComponentCache, pick_dtype
from serve_app.models.catalog import Catalog
from serve_app.models.devices import pick_device
from serve_app.models.publish import publish
from support.built import build_net

NETS = ("one", "two", "three")
CPU = torch.device("cpu")


@pytest.fixture
def nets(catalog: Catalog, net: Path) -> Catalog:
    for name in NETS:
        publish(catalog, ModelSource(id=name, path=net))
    return catalog


CacheMaker = Callable[[float], ComponentCache]


@pytest.fixture
async def make(nets: Catalog) -> AsyncIterator[CacheMaker]:
    """A cache with room for so many nets."""
    made: list[ComponentCache] = []
    each = nets.get("one").size_bytes

    def make(room: float) -> ComponentCache:
        made.append(ComponentCache(nets, CPU, torch.float32, int(room * each)))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


async def use(cache: ComponentCache, name: str) -> None:
    with await cache.net(name):
        pass


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  - the cache announces nothing in between
        await asyncio.sleep(0)


async def test_a_component_is_loaded_once(make: CacheMaker) -> None:
    cache = make(10)
    first = await cache.net("one")
    again = await cache.net("one")
    assert again.value is first.value
    assert first.value.id == "one"
    assert cache.loaded() == ("one",)
    assert cache.loaded_bytes == first.value.size_bytes


async def test_all_who_ask_at_once_share_one_load(make: CacheMaker) -> None:
    cache = make(10)
    leases = await asyncio.gather(*(cache.net("one") for _ in range(8)))
    assert len({id(lease.value) for lease in leases}) == 1


async def test_the_least_recently_used_goes_first(make: CacheMaker) -> None:
    cache = make(2.5)
    for name in ("one", "two", "one", "three"):
        await use(cache, name)
    assert cache.loaded() == ("one", "three")


async def test_what_is_leased_stays_even_over_budget(make: CacheMaker) -> None:
    cache = make(1.5)
    one, two = await cache.net("one"), await cache.net("two")
    assert cache.loaded() == ("one", "two")
    one.release()
    assert cache.loaded() == ("two",)
    two.release()
    assert cache.loaded() == ("two",)
    await use(cache, "three")
    assert cache.loaded() == ("three",)


async def test_all_that_nobody_holds_can_be_given_up(make: CacheMaker) -> None:
    cache = make(10)
    for name in ("one", "three"):
        await use(cache, name)
    with await cache.net("two"):
        cache.release_unused()
        assert cache.loaded() == ("two",)
    assert cache.loaded() == ("two",)
    cache.release_unused()
    assert cache.loaded() == ()
    assert cache.loaded_bytes == 0


async def test_a_lease_counts_once_however_often_it_is_released(make: CacheMaker) -> None:
    cache = make(0.5)
    held, other = await cache.net("one"), await cache.net("one")
    for _ in range(3):
        other.release()
    assert cache.loaded() == ("one",)
    held.release()
    assert cache.loaded() == ()
    assert cache.loaded_bytes == 0


async def test_threads_may_release(make: CacheMaker) -> None:
    cache = make(0.5)
    leases = [await cache.net("one") for _ in range(64)]
    threads = [threading.Thread(target=lease.release) for lease in leases for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.loaded() == ()


async def test_a_failed_load_reaches_all_and_is_tried_again(make: CacheMaker, net: Path) -> None:
    cache = make(10)
    weights = net / "diffusion_pytorch_model.safetensors"
    weights.rename(net / "away")
    outcomes = await asyncio.gather(*(cache.net("one") for _ in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ModelLoadFailed] * 4
    assert cache.loaded() == ()
    (net / "away").rename(weights)
    await use(cache, "one")
    assert cache.loaded() == ("one",)


async def test_one_who_gives_up_does_not_take_the_load_from_the_others(make: CacheMaker) -> None:
    cache = make(0.5)
    first = asyncio.create_task(cache.net("one"))
    second = asyncio.create_task(cache.net("one"))
    await until(lambda: "one" in cache._slots and cache._slots["one"].pins == 2)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    lease = await second
    assert lease.value.id == "one"
    lease.release()
    assert cache.loaded() == ()  # the one that gave up holds nothing


async def test_a_load_that_all_gave_up_on_is_kept_for_the_next(make: CacheMaker) -> None:
    cache = make(10)
    only = asyncio.create_task(cache.net("one"))
    await until(lambda: "one" in cache._slots)
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    lease = await cache.net("one")
    lease.release()
    assert cache.loaded() == ("one",)


async def test_the_event_loop_goes_on_while_a_model_loads(make: CacheMaker) -> None:
    cache = make(10)
    loading = asyncio.create_task(cache.net("one"))
    turns = 0
    while not loading.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10
    (await loading).release()


async def test_a_model_published_anew_is_loaded_anew(make: CacheMaker, nets: Catalog, tmp_path: Path) -> None:
    cache = make(10)
    old = await cache.net("one")
    publish(nets, ModelSource(id="one", path=build_net(tmp_path / "new", seed=9)))
    new = await cache.net("one")
    assert new.value.hash == nets.get("one").hash != old.value.hash
    assert cache.loaded_bytes == old.value.size_bytes + new.value.size_bytes
    old.release()
    assert cache.loaded_bytes == new.value.size_bytes


async def test_unknown_models_and_wrong_types_are_named(make: CacheMaker) -> None:
    cache = make(10)
    with pytest.raises(UnknownModel, match=r"Allowed: one, two, three\."):
        await cache.net("four")
    with pytest.raises(UnknownModel, match="base model 'one' is unknown"):
        await cache.base("one")


async def test_a_database_that_is_away_is_nobodys_fault(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.sqlite3'}")  # no tables
    cache = ComponentCache(Catalog(database), CPU, torch.float32, 0)
    with pytest.raises(RetryableError, match="catalogue cannot be read now"):
        await cache.net("one")
    cache.close()
    database.close()


async def test_base_models_are_components_too(make: CacheMaker, nets: Catalog, base: Path) -> None:
    publish(nets, ModelSource(id="dream", path=base))
    with await make(0).base("dream") as loaded:
        assert loaded.unet.config.cross_attention_dim == 16


async def test_a_closed_cache_refuses(make: CacheMaker) -> None:
    cache = make(10)
    lease = await cache.net("one")
    cache.close()
    with pytest.raises(WorkerBusy, match="shutting down"):
        await cache.net("one")
    lease.release()


def test_devices_and_dtypes() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype("auto", torch.device("cuda")) is torch.float16
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(ConfigError, match="device 'gpu'"):
        pick_device("gpu")
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        pick_dtype("int8", CPU)
