import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from serve_app.config import DenoiserConfig
from serve_app.engine.generator import ImageGenerator, health_problem
from serve_app.errors import (
    Cancelled,
    FamilyMismatch,
    OutOfMemory,
    RetryableError,
    ServeError,
    UnknownModel,
    WorkerBusy,
    WorkerLost,
)
from serve_app.metrics import PrometheusMeter
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.storage.local import LocalStore
from serve_app.tasks import AttemptRef, Mode, OutputOptions
from support.tiny import SIDE, Zoo, controls, half_mask, picture, task

Component = TypeVar("Component", BaseComponents, NetComponents)
REF = AttemptRef(job_id=5, attempt=2)
OUTPUT = OutputOptions(file_prefix="fox")


@dataclass
class Shelf:
    """Models that are always there; counts who holds them."""

    zoo: Zoo
    held: list[str] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Loads wait for it."""
    trouble: ServeError | None = None
    """What every load ends with."""
    given_up: list[tuple[str, ...]] = field(default_factory=list)
    """What was held when the unused were given up."""

    async def base(self, model_id: str) -> AbstractContextManager[BaseComponents]:
        await self.gate.wait()
        if self.trouble is not None:
            raise self.trouble
        if model_id != "base":
            raise UnknownModel
        return self._hold(self.zoo.base)

    async def net(self, net_id: str) -> AbstractContextManager[NetComponents]:
        await self.gate.wait()
        return self._hold(self.zoo.nets[net_id])

    def loaded(self) -> tuple[str, ...]:
        return ("base",)

    def release_unused(self) -> None:
        self.given_up.append(tuple(self.held))

    @contextmanager
    def _hold(self, components: Component) -> Iterator[Component]:
        self.held.append(components.id)
        try:
            yield components
        finally:
            self.held.remove(components.id)


@dataclass(frozen=True)
class Workshop:
    """A generator and what stands around it."""

    generator: ImageGenerator
    shelf: Shelf
    store: LocalStore
    meter: PrometheusMeter

    async def soon(self, condition: Callable[[], bool]) -> bool:
        """Whether it holds within five seconds."""
        for _ in range(500):
            if condition():
                return True
            await asyncio.sleep(0.01)
        return False

    async def released(self) -> bool:
        """Whether every model is let go of, now or soon."""
        return await self.soon(lambda: not self.shelf.held)


@pytest.fixture
async def workshop(zoo: Zoo, tmp_path: Path) -> AsyncIterator[Workshop]:
    shelf, store, meter = Shelf(zoo), LocalStore(tmp_path / "objects"), PrometheusMeter()
    shelf.gate.set()
    generator = ImageGenerator(DenoiserConfig(), shelf, store, meter, "replica-1", "node-1")
    yield Workshop(generator, shelf, store, meter)
    await generator.close()


def ref(attempt: int) -> AttemptRef:
    return AttemptRef(job_id=5, attempt=attempt)


async def test_pictures_are_stored_under_the_attempts_name(workshop: Workshop) -> None:
    wanted = task(samples=2, controls=controls("canny"))
    result = await workshop.generator.generate(REF, wanted, OUTPUT, None, None, [picture(SIDE, SIDE, 1)])
    assert result.keys == ("attempts/5/2/fox-0.png", "attempts/5/2/fox-1.png")
    for key in result.keys:
        stored = Image.open(io.BytesIO(workshop.store.get(key)))
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (SIDE, SIDE))
        info = workshop.store.info(key)
        assert info is not None
        assert info.content_type == "image/png"
    assert (result.model_hash, result.net_hashes) == ("hash-of-base", ("hash-of-canny",))
    assert (result.unet_forwards, result.mean_rows) == (5, 4.0)
    assert result.queue_s >= 0
    assert result.run_s > 0
    assert await workshop.released()
    read = workshop.meter.registry.get_sample_value
    assert read("controlnet_unet_forwards_total", {"model": "base"}) == 5
    assert read("controlnet_unet_rows_total", {"model": "base"}) == 20
    assert read("controlnet_controlnet_forwards_total", {"net": "canny"}) == 5


async def test_pictures_as_base64_text(workshop: Workshop) -> None:
    plain = await workshop.generator.generate(ref(1), task(), OUTPUT, None, None, ())
    text_output = OutputOptions(file_prefix="fox", base64_text=True)
    text = await workshop.generator.generate(ref(2), task(), text_output, None, None, ())
    info = workshop.store.info(text.keys[0])
    assert info is not None
    assert info.content_type == "text/plain"
    assert base64.b64decode(workshop.store.get(text.keys[0])) == workshop.store.get(plain.keys[0])


async def test_image_and_mask_reach_the_engine(workshop: Workshop) -> None:
    """Where the mask keeps the image, the picture is the image as the VAE sees it; where it repaints, it is not."""
    image, mask = picture(SIDE, SIDE, 1), half_mask(SIDE, SIDE)
    drawn = []
    for seed in (1, 2):
        wanted = task(mode=Mode.MASKED, strength=0.9, seed=seed, steps=4)
        result = await workshop.generator.generate(ref(seed), wanted, OUTPUT, image, mask, ())
        drawn.append(np.asarray(Image.open(io.BytesIO(workshop.store.get(result.keys[0])))).astype(int))
    difference = np.abs(drawn[0] - drawn[1]).mean(axis=2)
    assert difference[mask == 255].mean() > 2 * difference[:8].mean()


async def test_concurrent_requests_share_forwards(workshop: Workshop) -> None:
    generate = workshop.generator.generate
    calls = [generate(ref(n), task(seed=n, steps=12), OUTPUT, None, None, ()) for n in range(6)]
    results = await asyncio.gather(*calls)
    assert max(result.mean_rows for result in results) > 6
    stats = workshop.generator.stats()
    assert (stats.replica, stats.node, stats.running, stats.waiting) == ("replica-1", "node-1", 0, 0)
    assert (stats.generate_calls, stats.unet_rows, stats.models) == (6, 6 * 12 * 2, ("base",))
    assert stats.unet_forwards < 6 * 12
    assert not stats.deterministic


async def test_deterministic_generators_say_so(workshop: Workshop) -> None:
    pinned = ImageGenerator(
        DenoiserConfig(deterministic=4), workshop.shelf, workshop.store, workshop.meter, "replica-4", "node-1"
    )
    assert pinned.stats().deterministic
    await pinned.close()


async def test_a_net_of_another_family_is_refused(workshop: Workshop) -> None:
    wanted = task(controls=controls("other-family"))
    with pytest.raises(FamilyMismatch):
        await workshop.generator.generate(REF, wanted, OUTPUT, None, None, [picture(SIDE, SIDE, 1)])
    assert workshop.shelf.held == []
    with pytest.raises(UnknownModel):
        await workshop.generator.generate(REF, task(model="nowhere"), OUTPUT, None, None, ())


async def test_cancel_stops_a_running_request(workshop: Workshop) -> None:
    long = asyncio.create_task(workshop.generator.generate(REF, task(steps=900), OUTPUT, None, None, ()))
    assert await workshop.soon(lambda: workshop.generator.stats().running == 1)
    assert await workshop.soon(lambda: workshop.generator.progress([REF, ref(99)]).get(REF, 0) > 0)
    assert set(workshop.generator.progress([REF, ref(99)])) == {REF}
    await workshop.generator.cancel(ref(99))
    await workshop.generator.cancel(REF)
    with pytest.raises(Cancelled):
        await long
    assert await workshop.released()
    assert workshop.store.info("attempts/5/2/fox-0.png") is None


async def test_cancel_while_the_model_loads(workshop: Workshop) -> None:
    workshop.shelf.gate.clear()
    call = asyncio.create_task(workshop.generator.generate(REF, task(), OUTPUT, None, None, ()))
    await asyncio.sleep(0.01)
    assert workshop.generator.stats().waiting == 1
    await workshop.generator.cancel(REF)
    workshop.shelf.gate.set()
    with pytest.raises(Cancelled):
        await call
    assert workshop.shelf.held == []
    assert workshop.generator.stats().unet_forwards == 0


async def test_a_caller_that_goes_away_cancels_its_request(workshop: Workshop) -> None:
    call = asyncio.create_task(workshop.generator.generate(REF, task(steps=900), OUTPUT, None, None, ()))
    assert await workshop.soon(lambda: workshop.generator.stats().running == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await workshop.released()
    assert workshop.generator.stats().running == 0


class SlowStore(LocalStore):
    """Every write waits for ``gate``; ``at_work`` counts those that do."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = threading.Event()
        self.at_work = 0

    def put(self, key: str, data: bytes, content_type: str) -> None:
        self.at_work += 1
        self.gate.wait(30)
        super().put(key, data, content_type)


async def test_a_call_that_is_cancelled_leaves_nobody_writing(workshop: Workshop, tmp_path: Path) -> None:
    """What deletes the attempt's files afterwards must find all of them."""
    store = SlowStore(tmp_path / "slow")
    generator = ImageGenerator(
        DenoiserConfig(encode_workers=1), workshop.shelf, store, workshop.meter, "replica-3", "node-1"
    )
    call = asyncio.create_task(generator.generate(REF, task(steps=1, samples=3), OUTPUT, None, None, ()))
    assert await workshop.soon(lambda: store.at_work == 1)
    for _ in range(2):
        call.cancel()
        await asyncio.sleep(0.05)
        assert not call.done()
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert store.info("attempts/5/2/fox-0.png") is not None
    await generator.close()
    assert store.at_work == 1  # those that had not begun never did
    assert store.info("attempts/5/2/fox-1.png") is None


async def test_a_store_that_fails_asks_for_another_try(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    broken = LocalStore(tmp_path / "objects")
    (tmp_path / "objects").rename(tmp_path / "elsewhere")
    (tmp_path / "objects").symlink_to(tmp_path / "file")
    generator = ImageGenerator(DenoiserConfig(), workshop.shelf, broken, workshop.meter, "replica-2", "node-1")
    with pytest.raises(RetryableError, match="could not be stored"):
        await generator.generate(REF, task(steps=2), OUTPUT, None, None, ())
    await generator.close()


async def test_a_closed_generator_is_unhealthy_and_takes_nothing(workshop: Workshop) -> None:
    workshop.generator.check_health()
    await workshop.generator.close()
    with pytest.raises(RuntimeError, match="dead"):
        workshop.generator.check_health()
    with pytest.raises(WorkerBusy):
        await workshop.generator.generate(REF, task(), OUTPUT, None, None, ())
    assert workshop.shelf.held == []


async def test_a_device_that_breaks_while_loading_makes_the_replica_unhealthy(workshop: Workshop) -> None:
    workshop.shelf.trouble = RetryableError("the disk is away")
    with pytest.raises(RetryableError):
        await workshop.generator.generate(ref(1), task(), OUTPUT, None, None, ())
    workshop.generator.check_health()
    workshop.shelf.trouble = WorkerLost("the accelerator broke")
    with pytest.raises(WorkerLost):
        await workshop.generator.generate(ref(2), task(), OUTPUT, None, None, ())
    with pytest.raises(RuntimeError, match="accelerator broke"):
        workshop.generator.check_health()
    with pytest.raises(WorkerBusy, match="being replaced"):
        await workshop.generator.generate(ref(3), task(), OUTPUT, None, None, ())


async def test_what_nobody_holds_is_given_up_when_memory_runs_out(workshop: Workshop, zoo: Zoo) -> None:
    """The request's own models stay: the next attempt needs them."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    hook = zoo.base.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory):
        await workshop.generator.generate(ref(1), task(), OUTPUT, None, None, ())
    hook.remove()
    assert workshop.shelf.given_up == [("base",)]
    workshop.shelf.trouble = OutOfMemory("no room for the model")
    with pytest.raises(OutOfMemory):
        await workshop.generator.generate(ref(2), task(), OUTPUT, None, None, ())
    assert workshop.shelf.given_up == [("base",), ()]


def test_slow_is_healthy_and_stuck_is_not() -> None:
    assert health_problem(alive=True, death=None, silent_s=590) is None
    assert "610 s" in str(health_problem(alive=True, death=None, silent_s=610))
    assert "ValueError" in str(health_problem(alive=False, death=ValueError(), silent_s=0))
