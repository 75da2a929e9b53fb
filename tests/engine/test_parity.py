"""The engine draws what diffusers' own pipelines draw: final latents of the same request, 1e-4 relative."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from diffusers.utils import logging as diffusers_logging

from serve_app.engine.request import GenerationRequest
from serve_app.schedulers import SCHEDULERS, available_schedulers
from serve_app.tasks import ControlInput, Mode
from support.reference import reference
from support.tiny import Zoo, controls, drawn_alone, latents, picture, relative_error, request, task

TOLERANCE = 1e-4
STRENGTH = {Mode.TEXT: 1.0, Mode.IMAGE: 0.7, Mode.MASKED: 0.8}
NETS = ((), ("canny",), ("canny", "depth"))


@pytest.fixture(autouse=True)
def quiet_diffusers() -> Iterator[None]:
    """Pipelines without a safety checker say so every time."""
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    yield
    diffusers_logging.set_verbosity(before)


def assert_parity(asked: GenerationRequest) -> None:
    assert relative_error(latents(drawn_alone(asked)), reference(asked)) < TOLERANCE


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("scheduler", available_schedulers())
def test_every_scheduler_in_every_mode(zoo: Zoo, scheduler: str, mode: Mode) -> None:
    """One net in every case; which net, guess mode and Karras alternate over the table."""
    odd = (available_schedulers().index(scheduler) + list(Mode).index(mode)) % 2 == 1
    wanted = task(
        scheduler=scheduler,
        mode=mode,
        strength=STRENGTH[mode],
        steps=6,
        controls=controls("depth" if odd else "canny"),
        guess_mode=odd,
        use_karras_sigmas=not odd,
    )
    assert_parity(request(zoo, wanted))


@pytest.mark.full
@pytest.mark.parametrize(
    ("scheduler", "mode", "nets", "guess", "karras"),
    [
        case
        for case in itertools.product(available_schedulers(), Mode, NETS, (False, True), (False, True))
        if (case[2] or not case[3]) and (SCHEDULERS[case[0]].karras or not case[4])
    ],
)
def test_whole_matrix(zoo: Zoo, scheduler: str, mode: Mode, nets: tuple[str, ...], guess: bool, karras: bool) -> None:
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
