"""Requests among others: what one asks must not change what another gets. Random crowds: ``test_deterministic.py``."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.engine.samplers import ModelCall, Sampler
from serve_app.errors import Cancelled, FamilyMismatch, JobError, OutOfMemory, ServeError, WorkerLost
from serve_app.tasks import AttemptRef, ControlInput, Mode
from support.tiny import (
    Zoo,
    controls,
    drawn_alone,
    half_mask,
    latents,
    picture,
    relative_error,
    request,
    run,
    task,
    tiny_base,
    tiny_engine,
    tiny_net,
)

TOLERANCE = 1e-4


def finished(outcome: RunningRequest | ServeError) -> RunningRequest:
    assert isinstance(outcome, RunningRequest), outcome
    return outcome


def pixels(running: RunningRequest) -> list[bytes]:
    return [each.pixels.tobytes() for each in running.pictures if each.pixels is not None]


UNLIKE: list[dict[str, Any]] = [
    {"controls": controls("canny"), "steps": 8},
    {"scheduler": "EulerDiscreteScheduler", "controls": controls("canny", "depth"), "guess_mode": True, "steps": 6},
    {"scheduler": "EulerAncestralDiscreteScheduler", "mode": Mode.IMAGE, "strength": 0.5, "samples": 2, "steps": 8},
    {"scheduler": "DPMSolverMultistepScheduler", "mode": Mode.MASKED, "strength": 0.9, "steps": 7},
    {"scheduler": "UniPCMultistepScheduler", "guidance_scale": 1.0, "controls": controls("shuffle"), "steps": 5},
    {"prompt": "long " * 30, "steps": 4},
    {"width": 32, "height": 48, "controls": controls("depth"), "steps": 5},
    {
        "steps": 9,
        "controls": (
            ControlInput(net="depth", control_type="depth", scale=1.2, end=0.5),
            ControlInput(net="canny", control_type="canny", scale=0.5, start=0.4),
        ),
    },
]


def test_eight_unlike_requests_that_come_and_go_draw_what_each_draws_alone(zoo: Zoo) -> None:
    requests = [request(zoo, task(seed=n, **changes)) for n, changes in enumerate(UNLIKE)]
    together = run(tiny_engine(max_rows=12), [(index, one) for index, one in enumerate(requests)])
    for one in requests:
        ours = finished(together[one])
        assert relative_error(latents(ours), latents(drawn_alone(one))) < TOLERANCE
        assert np.isfinite(latents(ours).numpy()).all()
    assert any(finished(outcome).forward_rows > 2 * finished(outcome).forwards for outcome in together.values())


def test_the_same_request_gives_the_same_bytes(zoo: Zoo) -> None:
    wanted = task(scheduler="EulerAncestralDiscreteScheduler", controls=controls("canny", "depth"))
    first, second = (drawn_alone(request(zoo, wanted)) for _ in range(2))
    assert pixels(first) == pixels(second)
    assert len(set(pixels(first))) == 1


def test_identical_requests_in_one_batch_give_identical_pictures(zoo: Zoo) -> None:
    requests = [request(zoo, task(controls=controls("canny"))) for _ in range(3)]
    together = run(tiny_engine(), [(0, one) for one in requests])
    assert len({tuple(pixels(finished(outcome))) for outcome in together.values()}) == 1


def test_image_k_is_the_request_with_seed_plus_k(zoo: Zoo) -> None:
    """The last seed wraps around."""
    three = drawn_alone(request(zoo, task(seed=2**32 - 2, samples=3, scheduler="EulerAncestralDiscreteScheduler")))
    for k, seed in enumerate([2**32 - 2, 2**32 - 1, 0]):
        one = drawn_alone(request(zoo, task(seed=seed, scheduler="EulerAncestralDiscreteScheduler")))
        assert relative_error(latents(three)[k : k + 1], latents(one)) < TOLERANCE


def test_the_order_of_nets_does_not_matter_where_one_averages(zoo: Zoo) -> None:
    maps = {"shuffle": picture(64, 64, 1), "canny": picture(64, 64, 2)}
    drawn = [
        drawn_alone(request(zoo, task(controls=controls(*names)), maps=[maps[name] for name in names]))
        for names in (("shuffle", "canny"), ("canny", "shuffle"))
    ]
    assert relative_error(latents(drawn[0]), latents(drawn[1])) < TOLERANCE


def test_nets_and_maps_matter(zoo: Zoo) -> None:
    """Otherwise parity would prove nothing."""
    plain = latents(drawn_alone(request(zoo, task())))
    guided = latents(drawn_alone(request(zoo, task(controls=controls("canny")))))
    other_map = request(zoo, task(controls=controls("canny")), maps=[picture(64, 64, 99)])
    assert relative_error(guided, plain) > 0.01
    assert relative_error(latents(drawn_alone(other_map)), guided) > 1e-3


def test_float_maps_are_taken_as_they_are(zoo: Zoo) -> None:
    drawn = picture(64, 64, 3)
    as_bytes = request(zoo, task(controls=controls("canny")), maps=[drawn])
    as_floats = request(zoo, task(controls=controls("canny")), maps=[drawn.astype(np.float32) / 255])
    masked = drawn.astype(np.float32) / 255
    masked[10:20] = -1
    blanked = request(zoo, task(controls=controls("canny")), maps=[masked])
    assert pixels(drawn_alone(as_bytes)) == pixels(drawn_alone(as_floats))
    assert relative_error(latents(drawn_alone(blanked)), latents(drawn_alone(as_bytes))) > 1e-4


def test_a_net_runs_only_where_it_has_a_say(zoo: Zoo) -> None:
    """Half the steps are outside the window, one net has scale 0: counted by hooks on the nets."""
    calls = {"canny": 0, "depth": 0}

    def counter(name: str) -> Any:
        def count(*_: object) -> None:
            calls[name] += 1

        return count

    hooks = [zoo.nets[name].net.controlnet_mid_block.register_forward_hook(counter(name)) for name in calls]
    asked = (
        ControlInput(net="canny", control_type="canny", start=0.5),
        ControlInput(net="depth", control_type="depth", scale=0.0),
    )
    drawn_alone(request(zoo, task(steps=8, controls=asked)))
    for hook in hooks:
        hook.remove()
    assert calls == {"canny": 4, "depth": 0}


def test_a_request_joins_at_once_and_leaves_when_done(zoo: Zoo) -> None:
    engine = tiny_engine()
    long, short = request(zoo, task(steps=9)), request(zoo, task(steps=2))
    engine.add(long)
    ended_at = {}
    for step in range(12):
        if step == 3:
            engine.add(short)
        for ended in engine.step():
            ended_at[ended.request] = step
    assert ended_at[short] == 4
    assert ended_at[long] == 8


def test_no_more_run_than_allowed_and_the_rest_wait_in_line(zoo: Zoo) -> None:
    engine = tiny_engine(max_running=2)
    requests = [request(zoo, task(steps=3)) for _ in range(5)]
    for one in requests:
        engine.add(one)
    order: list[GenerationRequest] = []
    while engine.busy:
        order += [ended.request for ended in engine.step()]
        assert engine.running <= 2
    assert order == requests


def test_cancelled_requests_leave_at_the_next_boundary(zoo: Zoo) -> None:
    for moment in range(6):
        engine = tiny_engine(max_running=2)
        stays, goes, waits = (request(zoo, task(steps=5)) for _ in range(3))
        for one in (stays, goes, waits):
            engine.add(one)
        outcomes = {ended.request: ended.outcome for _ in range(moment) for ended in engine.step()}
        engine.cancel(goes.ref)
        engine.cancel(waits.ref)
        engine.cancel(AttemptRef(job_id=10**9, attempt=1))
        outcomes |= {ended.request: ended.outcome for ended in engine.step()}
        assert isinstance(outcomes[goes], Cancelled)
        assert isinstance(outcomes[waits], Cancelled)
        while engine.busy:
            outcomes |= {ended.request: ended.outcome for ended in engine.step()}
        assert relative_error(latents(finished(outcomes[stays])), latents(drawn_alone(stays))) < TOLERANCE


def test_a_suspect_runs_alone_and_in_its_turn(zoo: Zoo) -> None:
    engine = tiny_engine()
    before, behind = ([request(zoo, task(steps=3)) for _ in range(2)] for _ in range(2))
    suspect = request(zoo, task(steps=3), alone=True)
    outcomes = run(engine, [(0, before[0]), (0, before[1]), (0, suspect), (0, behind[0]), (1, behind[1])])
    lone = finished(outcomes[suspect])
    assert lone.forward_rows == 2 * lone.forwards
    assert list(outcomes) == [*before, suspect, *behind]
    assert finished(outcomes[behind[0]]).forward_rows > 2 * finished(outcomes[behind[0]]).forwards


@contextmanager
def breaking(module: torch.nn.Module, error: Exception, at_call: int) -> Iterator[None]:
    """``module`` raises ``error`` once, when called for the ``at_call``-th time."""
    calls = iter(range(1, 10_000))

    def hook(*_: object) -> None:
        if next(calls) == at_call:
            raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("boom"), WorkerLost),
        (torch.OutOfMemoryError("no memory"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), OutOfMemory),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
    ],
)
def test_a_broken_forward_ends_the_requests_in_it_and_no_others(
    zoo: Zoo, error: Exception, expected: type[ServeError]
) -> None:
    other = Zoo(tiny_base("other", seed=9), zoo.inpaint, zoo.nets)
    hit, apart = [request(zoo, task()) for _ in range(2)], request(other, task())
    with breaking(zoo.base.unet.conv_in, error, at_call=2):
        outcomes = run(tiny_engine(), [(0, hit[0]), (0, hit[1]), (0, apart)])
    assert [type(outcomes[one]) for one in hit] == [expected, expected]
    assert len(latents(finished(outcomes[apart]))) == 1


def test_who_breaks_a_forward_alone_is_to_blame(zoo: Zoo) -> None:
    with breaking(zoo.base.unet.conv_in, RuntimeError("boom"), at_call=1):
        one = request(zoo, task())
        outcome = run(tiny_engine(), [(0, one)])[one]
    assert isinstance(outcome, JobError)
    assert "boom" in outcome.message


def test_the_engine_goes_on_after_running_out_of_memory(zoo: Zoo) -> None:
    engine = tiny_engine()
    first, second = request(zoo, task()), request(zoo, task())
    with breaking(zoo.base.unet.conv_in, torch.OutOfMemoryError("no memory"), at_call=3):
        assert isinstance(run(engine, [(0, first)])[first], OutOfMemory)
    assert pixels(finished(run(engine, [(0, second)])[second])) == pixels(drawn_alone(second))


def test_an_error_of_ours_in_a_shared_forward_condemns_nobody(zoo: Zoo) -> None:
    """Whose fault it is cannot be known there: all may run again, alone."""
    engine = tiny_engine()
    pair = [request(zoo, task(seed=seed)) for seed in range(2)]
    for one in pair:
        engine.add(one)
    with breaking(zoo.base.unet.conv_in, JobError("not this one"), at_call=1):
        ended = engine.step()
    assert [type(one.outcome) for one in ended] == [WorkerLost, WorkerLost]


def test_a_net_for_another_shape_of_unet_is_refused_by_name(zoo: Zoo) -> None:
    """As distilled bases and ordinary nets of one family have."""
    deeper = tiny_net("deeper", layers_per_block=2)
    bigger = replace(zoo, nets={**zoo.nets, "deeper": deeper})
    with pytest.raises(FamilyMismatch, match="'deeper' does not fit the model 'base'"):
        request(bigger, task(controls=(ControlInput(net="deeper", control_type="canny"),)))


def test_failed_requests_hold_no_tensors(zoo: Zoo) -> None:
    engine = tiny_engine()
    one = request(zoo, task(controls=controls("canny")))
    engine.add(one)
    engine.step()
    state = weakref.ref(engine._running[0].conditioning.text)
    with breaking(zoo.base.unet.conv_in, torch.OutOfMemoryError("no memory"), at_call=1):
        ended = engine.step()
    engine.step()
    engine._prompts = type(engine._prompts)()
    gc.collect()
    assert isinstance(ended[0].outcome, OutOfMemory)
    assert state() is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        pytest.param({"clip_skip": 12}, "text_encoder", id="encoding"),
        pytest.param({"mode": Mode.IMAGE, "strength": 0.5}, "vae.encoder", id="image"),
        pytest.param({"steps": 2}, "vae.decoder", id="decoding"),
    ],
)
def test_a_failure_outside_the_forward_ends_one_request(zoo: Zoo, changes: dict[str, Any], part: str) -> None:
    good, bad = request(zoo, task(steps=6, prompt="stays")), request(zoo, task(**changes))
    module: Any = zoo.base
    for name in part.split("."):
        module = getattr(module, name)
    never = 9_999
    with breaking(module, RuntimeError("boom"), at_call=never if part == "text_encoder" else 1):
        outcomes = run(tiny_engine(), [(0, good), (1, bad)])
    assert isinstance(outcomes[bad], JobError)
    assert relative_error(latents(finished(outcomes[good])), latents(drawn_alone(good))) < TOLERANCE


def test_a_sampler_that_fails_takes_nobody_with_it(zoo: Zoo) -> None:
    def failing(call: ModelCall) -> Sampler:
        yield call
        raise RuntimeError("boom")

    engine = tiny_engine()
    good, bad = request(zoo, task()), request(zoo, task())
    engine.add(good)
    engine.add(bad)
    engine.step()
    broken = engine._running[1].pictures[0]
    assert broken.call is not None
    broken.sampler = failing(broken.call)
    broken.begin()
    outcomes: dict[GenerationRequest, RunningRequest | ServeError] = {}
    while engine.busy:
        outcomes |= {ended.request: ended.outcome for ended in engine.step()}
    assert isinstance(outcomes[bad], JobError)
    assert len(pixels(finished(outcomes[good]))) == 1


def test_a_picture_of_nothing_is_an_error(zoo: Zoo) -> None:
    """NaN would be stored as a black picture."""
    poisoned = request(zoo, task(controls=controls("canny")), maps=[np.full((64, 64, 3), np.nan, np.float32)])
    outcome = run(tiny_engine(), [(0, poisoned)])[poisoned]
    assert isinstance(outcome, JobError)
    assert "finite" in outcome.message


def test_what_cannot_run_is_refused_by_name(zoo: Zoo) -> None:
    with pytest.raises(FamilyMismatch, match=r"other-family.*sdxl.*sd15"):
        request(zoo, task(controls=controls("other-family")))
    with pytest.raises(JobError, match="inpainting"):
        request(zoo, task(model="inpaint"))
    with pytest.raises(JobError, match="multiples of 2"):
        request(zoo, task(width=65))
    with pytest.raises(JobError, match="control map for canny"):
        request(zoo, task(controls=controls("canny")), maps=[picture(32, 64, 1)])
    with pytest.raises(JobError, match="float64"):
        request(zoo, task(controls=controls("canny")), maps=[np.zeros((64, 64, 3))])
    with pytest.raises(JobError, match="1 controls came with 1 nets and 0"):
        request(zoo, task(controls=controls("canny")), maps=[])
    good = request(zoo, task())
    with pytest.raises(JobError, match="needs an init image"):
        GenerationRequest(good.ref, task(mode=Mode.IMAGE), zoo.base)
    with pytest.raises(JobError, match="needs a mask"):
        GenerationRequest(good.ref, task(mode=Mode.MASKED), zoo.base, init_image=picture(64, 64, 1))
    with pytest.raises(JobError, match="too large"):
        tiny_engine(max_latent_area=32 * 32).add(good)
    assert half_mask(64, 64).max() == 255


def test_an_unknown_scheduler_fails_its_request(zoo: Zoo) -> None:
    one = request(zoo, task(scheduler="NoSuchScheduler"))
    outcome = run(tiny_engine(), [(0, one)])[one]
    assert isinstance(outcome, JobError)
    assert "DDIMScheduler" in outcome.message
