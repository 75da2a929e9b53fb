"""How far a request is: counted by the samplers, kept by the engine, read by other threads."""

import threading
from itertools import pairwise

import pytest
import torch

from serve_app.engine.driver import EngineDriver
from serve_app.engine.encode import encode_source
from serve_app.engine.samplers import ModelCall, Sampler, sampler
from serve_app.schedulers import SCHEDULERS, available_schedulers
from serve_app.tasks import Mode
from support.tiny import Zoo, request, task, tiny_engine

SMALL = {"width": 32, "height": 32}


def _ask(asking: Sampler, answer: torch.Tensor | None) -> ModelCall | None:
    """The sampler's next call; None once it has ended."""
    try:
        return asking.send(answer)  # type: ignore[arg-type]  # None starts a generator
    except StopIteration:
        return None


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("scheduler", available_schedulers())
@torch.inference_mode()
def test_every_sampler_tells_which_share_of_its_evaluations_is_done(zoo: Zoo, scheduler: str, mode: Mode) -> None:
    """Call k of n has k / n behind it, whatever the order and the number of phases."""
    if mode is Mode.TEXT and SCHEDULERS[scheduler].needs_image:
        mode = Mode.IMAGE
    wanted = request(zoo, task(**SMALL, scheduler=scheduler, mode=mode, strength=0.7, steps=7))
    asking = sampler(zoo.base.scheduler_config, wanted.task, encode_source(wanted), seed=1)
    told, answer = [], None
    while (call := _ask(asking, answer)) is not None:
        told.append(call.progress)
        answer = torch.zeros_like(call.latent)
    assert told == [k / len(told) for k in range(len(told))]


def test_progress_rises_with_every_evaluation(zoo: Zoo) -> None:
    """Two pictures that take turns, for only one fits into a forward; a neighbour of another size is between them."""
    engine = tiny_engine(max_rows=2)
    one, other = request(zoo, task(**SMALL, samples=2, steps=3)), request(zoo, task(width=64, height=32, steps=2))
    engine.add(one)
    engine.add(other)
    assert engine.progress == {}
    seen: dict[tuple[int, int], list[float]] = {(each.ref.job_id, each.ref.attempt): [0.0] for each in (one, other)}
    while engine.busy:
        engine.step()
        for key, share in engine.progress.items():
            seen[key].append(share)
    for shares in seen.values():
        assert shares == sorted(shares)
    # The last evaluation is decoded in the step that makes it, and then nobody is there any more.
    assert sorted(set(seen[one.ref.job_id, 1])) == pytest.approx([k / 6 for k in range(6)])
    assert sorted(set(seen[other.ref.job_id, 1])) == [0.0, 0.5]
    assert engine.progress == {}


def test_an_attempt_that_waits_or_was_cancelled_has_none(zoo: Zoo) -> None:
    engine = tiny_engine(max_running=1)
    first, second = (request(zoo, task(**SMALL, steps=4)) for _ in range(2))
    engine.add(first)
    engine.add(second)
    engine.step()
    assert engine.progress == {(first.ref.job_id, 1): 0.25}
    engine.cancel(first.ref)
    engine.step()
    assert engine.progress == {(second.ref.job_id, 1): 0.25}


def test_another_thread_reads_it_while_the_engine_runs(zoo: Zoo) -> None:
    driver = EngineDriver(tiny_engine())
    one = request(zoo, task(**SMALL, steps=60))
    seen: list[float] = []
    halfway = threading.Event()

    def slow(*_: object) -> None:
        """A reader in the middle of a forward: what it sees is what the steps before it have done."""
        seen.append(driver.progress[one.ref.job_id, 1])
        if len(seen) == 30:
            halfway.set()

    hook = zoo.base.unet.conv_in.register_forward_pre_hook(slow)
    future = driver.submit(one)
    assert halfway.wait(30)
    polled = driver.progress.get((one.ref.job_id, 1))
    future.result(30)
    hook.remove()
    assert seen == [k / 60 for k in range(60)]
    assert polled is None or 29 / 60 <= polled <= 1
    assert all(before < after for before, after in pairwise(seen))
    assert driver.progress == {}
    driver.close()
