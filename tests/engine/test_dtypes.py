"""Half precision, as on a GPU: what float32 forgives, such as an operand of another dtype, fails here."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from serve_app.engine.request import RunningRequest
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import ImageArray, Mode
from support.tiny import Zoo, controls, drawn_alone, latents, relative_error, request, task, tiny_zoo

DTYPES = {torch.bfloat16: 0.15, torch.float16: 0.03}
"""dtype -> the error allowed against float32; bfloat16 has 8 bits, float16 has 11, and errors add up over the steps."""


@pytest.fixture(scope="module", params=list(DTYPES), ids=str)
def halved(request: pytest.FixtureRequest) -> Zoo:
    zoo, dtype = tiny_zoo(), request.param
    for base in (zoo.base, zoo.inpaint):
        for module in (base.unet, base.vae, base.text_encoder):
            torch.nn.Module.to(module, dtype=dtype)
    for net in zoo.nets.values():
        torch.nn.Module.to(net.net, dtype=dtype)
    return Zoo(replace(zoo.base, dtype=dtype), replace(zoo.inpaint, dtype=dtype), zoo.nets)


INVERSION = 4
"""Factor on what DDIMInverse may be off: five questions a step, and guidance magnifies what the way up got wrong."""

CASES = [
    (scheduler, mode, model)
    for scheduler, spec in SCHEDULERS.items()
    for mode, model in [(Mode.TEXT, "base"), (Mode.IMAGE, "base"), (Mode.MASKED, "base"), (Mode.MASKED, "inpaint")]
    if mode is not Mode.TEXT or not spec.needs_image
]


def pixels(running: RunningRequest) -> ImageArray:
    (picture,) = running.pictures
    assert picture.pixels is not None
    return picture.pixels


@pytest.mark.parametrize(("scheduler", "mode", "model"), CASES)
def test_every_mode_draws_in_half_precision(zoo: Zoo, halved: Zoo, scheduler: str, mode: Mode, model: str) -> None:
    wanted = task(
        mode=mode, model=model, strength=0.8, scheduler=scheduler, controls=controls("canny", "shuffle"), steps=5
    )
    half, whole = drawn_alone(request(halved, wanted)), drawn_alone(request(zoo, wanted))
    assert latents(half).dtype in {halved.base.dtype, torch.float32}
    tolerance = DTYPES[halved.base.dtype] * (INVERSION if SCHEDULERS[scheduler].sampler == "inversion" else 1)
    assert relative_error(latents(half).float(), latents(whole)) < tolerance
    difference = np.abs(pixels(half).astype(int) - pixels(whole).astype(int))
    assert difference.mean() < 255 * tolerance
