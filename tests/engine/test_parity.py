"""The engine draws what diffusers' own pipelines draw: final latents of the same request, 1e-4 relative."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from diffusers.utils import logging as diffusers_logging

from serve_app.engine.request import GenerationRequest
from serve_app.engine.samplers.steps import drive
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import ControlInput, Mode
from support.closed_form import GaussianModel, answer, wish
from support.reference import assert_parity, reference, reference_scheduler
from support.tiny import Zoo, controls, drawn_alone, picture, request, task

STRENGTH = {Mode.TEXT: 1.0, Mode.IMAGE: 0.7, Mode.MASKED: 0.8}
NETS = ((), ("canny",), ("canny", "depth"))


@pytest.fixture(autouse=True)
def quiet_diffusers() -> Iterator[None]:
    """Pipelines without a safety checker say so every time."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)


NO_ADD_NOISE = "the class cannot noise an image"
EXPLODING = "pipelines call step() as this class has none, and its sigmas fit another model"

NO_REFERENCE: Mapping[tuple[str, Mode], str] = {
    ("DDIMInverseScheduler", Mode.TEXT): "noise taken further up is no picture; ours refuses",
    ("DDIMInverseScheduler", Mode.IMAGE): NO_ADD_NOISE,
    ("DDIMInverseScheduler", Mode.MASKED): NO_ADD_NOISE,
    ("IPNDMScheduler", Mode.TEXT): "runs on noise levels of its own, and takes epsilon for v",
    ("IPNDMScheduler", Mode.IMAGE): NO_ADD_NOISE,
    ("IPNDMScheduler", Mode.MASKED): NO_ADD_NOISE,
    **dict.fromkeys(itertools.product(["KarrasVeScheduler", "ScoreSdeVeScheduler"], Mode), EXPLODING),
}
"""Where diffusers' pipeline fails or draws a wrong picture; test_samplers.py checks these."""

SERVED = [case for case in itertools.product(SCHEDULERS, Mode) if case not in NO_REFERENCE]


@pytest.mark.parametrize(("scheduler", "mode"), NO_REFERENCE)
def test_without_a_reference_there_is_none(zoo: Zoo, scheduler: str, mode: Mode) -> None:
    """diffusers' pipeline raises, or its loop draws another spread from a model whose answers are known."""
    if mode is not Mode.TEXT or NO_REFERENCE[scheduler, mode] == EXPLODING:
        with pytest.raises((AttributeError, TypeError, IndexError, NotImplementedError)):
            reference(request(zoo, task(scheduler=scheduler, mode=mode, strength=STRENGTH[mode])))
        return
    model = GaussianModel(mean=0.0)
    wanted = wish(scheduler, 30, mode=mode)
    shipped = reference_scheduler(wanted, model.config)
    shipped.set_timesteps(wanted.steps)
    as_shipped = drive(shipped, wanted, replace(model.source(32), image=None), 1)
    drawn = answer(as_shipped, model).latent
    assert not 0.84 < float(drawn.std()) / model.spread < 1.16


@pytest.mark.parametrize(("scheduler", "mode"), SERVED)
def test_every_scheduler_in_every_mode(zoo: Zoo, scheduler: str, mode: Mode) -> None:
    """One net in every case; which net, guess mode and Karras alternate over the table."""
    odd = SERVED.index((scheduler, mode)) % 2 == 1
    wanted = task(
        scheduler=scheduler,
        mode=mode,
        strength=STRENGTH[mode],
        steps=4,
        controls=controls("depth" if odd else "canny"),
        guess_mode=odd,
        use_karras_sigmas=not odd,
    )
    assert_parity(request(zoo, wanted))


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheduler", "mode", "nets", "guess", "karras"),
    [
        (*case, *rest)
        for case, *rest in itertools.product(SERVED, NETS, (False, True), (False, True))
        if (rest[0] or not rest[1]) and (SCHEDULERS[case[0]].karras or not rest[2])
    ],
)
def test_whole_matrix(
    zoo: Zoo,
    scheduler: str,
    mode: Mode,
    nets: tuple[str, ...],
    guess: bool,
    karras: bool,
) -> None:
    wanted = task(
        scheduler=scheduler,
        mode=mode,
        strength=STRENGTH[mode],
        steps=8,
        controls=controls(*nets),
        guess_mode=guess,
        use_karras_sigmas=karras,
    )
    assert_parity(request(zoo, wanted))


WINDOWED = (
    ControlInput(net="canny", control_type="canny", scale=1.3, start=0.0, end=0.5),
    ControlInput(net="depth", control_type="depth", scale=0.4, start=0.3, end=1.0),
)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"guidance_scale": 1.0, "controls": controls("canny")}, id="no guidance"),
        pytest.param(
            {"guidance_scale": 1.0, "guess_mode": True, "controls": controls("canny")}, id="guess, no guidance"
        ),
        pytest.param({"controls": WINDOWED}, id="windows and scales"),
        pytest.param({"controls": WINDOWED, "guess_mode": True}, id="windows and scales, guess"),
        pytest.param({"controls": WINDOWED, "mode": Mode.IMAGE, "strength": 0.6, "steps": 8}, id="windows, image"),
        pytest.param({"controls": controls("canny", scale=0.0)}, id="scale 0"),
        pytest.param({"controls": controls("shuffle")}, id="net that averages"),
        pytest.param({"controls": controls("shuffle"), "guess_mode": True}, id="net that averages, guess"),
        pytest.param({"samples": 3, "scheduler": "EulerAncestralDiscreteScheduler"}, id="samples"),
        pytest.param({"clip_skip": 1}, id="clip_skip"),
        pytest.param({"mode": Mode.MASKED, "strength": 1.0, "controls": controls("canny")}, id="masked at strength 1"),
        pytest.param({"mode": Mode.MASKED, "model": "inpaint", "strength": 0.7}, id="inpaint UNet"),
        pytest.param(
            {"mode": Mode.MASKED, "model": "inpaint", "strength": 1.0, "controls": controls("canny", "depth")},
            id="inpaint UNet at strength 1",
        ),
        pytest.param(
            {"scheduler": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver+++", "use_karras_sigmas": True},
            id="dpmsolver+++",
        ),
        pytest.param(
            {
                "scheduler": "DPMSolverSinglestepScheduler",
                "algorithm_type": "dpmsolver++",
                "mode": Mode.IMAGE,
                "strength": 0.6,
            },
            id="singlestep, dpmsolver++",
        ),
        pytest.param({"scheduler": "DPMSolverSDEScheduler", "samples": 2}, id="samples, Brownian noise"),
        pytest.param({"scheduler": "HeunDiscreteScheduler", "controls": WINDOWED}, id="windows of half steps"),
        pytest.param({"width": 96, "height": 48, "controls": controls("canny")}, id="not square"),
        pytest.param({"prompt": "", "negative_prompt": ""}, id="no prompt"),
        pytest.param({"prompt": "x" * 75, "negative_prompt": "A, b.  C"}, id="prompt of 75 tokens"),
    ],
)
def test_one_feature_at_a_time(zoo: Zoo, changes: dict[str, Any]) -> None:
    assert_parity(request(zoo, task(**changes)))


def test_images_of_other_sizes_are_resized_as_in_the_pipelines(zoo: Zoo) -> None:
    asked = request(zoo, task(mode=Mode.MASKED, strength=0.8, controls=controls("canny")))
    larger = GenerationRequest(
        asked.ref,
        asked.task,
        asked.base,
        asked.nets,
        picture(90, 120, seed=3),
        picture(70, 50, seed=4)[..., 0],
        asked.maps,
    )
    assert_parity(larger)


def test_at_least_one_step(zoo: Zoo) -> None:
    """diffusers refuses or draws nothing when steps x strength is below one."""
    running = drawn_alone(request(zoo, task(mode=Mode.IMAGE, strength=0.05, steps=5)))
    assert running.forwards == 1
    assert running.pictures[0].pixels is not None
