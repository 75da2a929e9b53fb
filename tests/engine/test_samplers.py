"""Every sampler draws from the data's own distribution, on a model whose answers are known exactly."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from serve_app.engine.samplers import ModelCall, sampler
from serve_app.engine.samplers.start import Draws
from serve_app.engine.samplers.steps import build_scheduler
from serve_app.errors import JobError
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import GenerationTask, Mode
from support.closed_form import ALPHA_BAR, SIDE, SIGMAS, Drawn, GaussianModel, altered, answer, draw, sigma_at, wish
from support.tiny import relative_error

MODEL = GaussianModel()
V_MODEL = replace(MODEL, prediction_type="v_prediction")

MEAN_TOLERANCE = 0.015
LATE_PNDM = 0.02
"""PNDM's second look needs the second timestep twice. Started late it gets it once, and diffusers' PNDM asks all later
questions a step late; we draw what it draws."""
FIRST_ORDER_NOISY, FIRST_ORDER, SECOND_ORDER = 0.16, 0.09, 0.06
"""How far the spread may be off at 30 steps, by the class of the sampler."""

SPREAD_TOLERANCE: Mapping[str, float] = {
    "DDPMScheduler": FIRST_ORDER_NOISY,
    "DDIMScheduler": FIRST_ORDER,
    "PNDMScheduler": SECOND_ORDER,
    # Of fourth order from noise. Started late, diffusers gives a first derivative the weight it has among four.
    "LMSDiscreteScheduler": FIRST_ORDER,
    "EulerDiscreteScheduler": FIRST_ORDER,
    "EulerAncestralDiscreteScheduler": FIRST_ORDER_NOISY,
    # Of second order, but of first order in the last step, which decides the spread.
    "DPMSolverMultistepScheduler": FIRST_ORDER,
    "HeunDiscreteScheduler": SECOND_ORDER,
    "KDPM2DiscreteScheduler": SECOND_ORDER,
    "DPMSolverSinglestepScheduler": FIRST_ORDER,
    "KDPM2AncestralDiscreteScheduler": SECOND_ORDER,
    "UniPCMultistepScheduler": FIRST_ORDER,
    "DDIMInverseScheduler": SECOND_ORDER,  # what it draws is the image itself
    "DEISMultistepScheduler": SECOND_ORDER,
    "IPNDMScheduler": SECOND_ORDER,
    "KarrasVeScheduler": SECOND_ORDER,
    "ScoreSdeVeScheduler": SECOND_ORDER,
    "DPMSolverSDEScheduler": SECOND_ORDER,
}
"""All but LCM, which is for models distilled to answer otherwise."""

CASES = [(name, flag) for name in SPREAD_TOLERANCE for flag in ((False, True) if SCHEDULERS[name].karras else (False,))]


def spread_error(latent: Tensor, model: GaussianModel) -> float:
    return abs(float(latent.std()) / model.spread - 1)


def check_moments(name: str, latent: Tensor, model: GaussianModel = MODEL) -> None:
    """Asserts that a sampler of 30 steps drew from the data."""
    tolerance = LATE_PNDM if name == "PNDMScheduler" else MEAN_TOLERANCE
    assert abs(float(latent.mean()) - model.mean) <= tolerance
    assert spread_error(latent, model) <= SPREAD_TOLERANCE[name]


def test_the_table_is_covered() -> None:
    assert set(SPREAD_TOLERANCE) == set(SCHEDULERS) - {"LCMScheduler"}


SIDES = {"DPMSolverSDEScheduler": 48}
"""Where not SIDE: its Brownian tree takes seconds at 64."""


@pytest.mark.parametrize(
    ("name", "use_karras", "strength"),
    [(*case, 1.0) for case in CASES] + [(name, False, 0.7) for name in SPREAD_TOLERANCE],
)
def test_draws_from_the_data_and_more_steps_do_it_better(name: str, use_karras: bool, strength: float) -> None:
    """From the exact marginal of its first level: all steps as from text, or what an init image leaves of them."""
    few, many = (
        draw(
            MODEL, wish(name, steps, strength=strength, use_karras_sigmas=use_karras), side=SIDES.get(name, SIDE)
        ).latent
        for steps in (30, 100)
    )
    check_moments(name, few)
    assert spread_error(many, MODEL) <= max(spread_error(few, MODEL) / 2, 0.01)


@pytest.mark.parametrize("name", [name for name in SPREAD_TOLERANCE if not SCHEDULERS[name].needs_image])
def test_draws_from_pure_noise(name: str) -> None:
    """With data around zero, whose mean the first latent has lost in any case."""
    model = replace(MODEL, mean=0.0)
    asking = sampler(model.config, wish(name, 30, mode=Mode.TEXT), replace(model.source(), image=None), 1)
    check_moments(name, answer(asking, model).latent, model)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_model_that_predicts_v_draws_the_same(name: str) -> None:
    if name == "PNDMScheduler":  # averages what the model said, whatever it means: another method with v
        check_moments(name, draw(V_MODEL, wish(name, 30)).latent)
        return
    wanted = wish(name, 8, strength=0.8)
    assert relative_error(draw(V_MODEL, wanted).latent, draw(MODEL, wanted).latent) < 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.8])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_the_mask_keeps_is_kept_and_the_rest_is_drawn(name: str, strength: float) -> None:
    half = SIDE // 2
    mask = torch.ones(1, 1, SIDE, SIDE)
    mask[..., :half] = 0
    source = replace(MODEL.source(), mask=mask)
    wanted = wish(name, 30, mode=Mode.MASKED, strength=strength)
    latent = answer(sampler(MODEL.config, wanted, source, 1), MODEL).latent
    image = Draws(source, 1).latent(source.image)
    assert torch.equal(latent[..., :half], image[..., :half])
    if name != "DDIMInverseScheduler":
        assert not torch.isclose(latent[..., half:], image[..., half:], atol=1e-3).all(dim=-1).any()
    if name in SPREAD_TOLERANCE and strength < 1:
        check_moments(name, latent[..., half:])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_base_without_signal_at_its_last_timestep(name: str) -> None:
    """Zero terminal SNR, whose highest sigma is infinite, at the API's default steps.

    With Karras sigmas the first timesteps are equal by rounding: who looks for a place by value takes the second.
    """
    trained = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V_MODEL.config}
    wanted = wish(name, 21, use_karras_sigmas=SCHEDULERS[name].karras)
    drawn = answer(sampler(trained, wanted, V_MODEL.source(8), 1), V_MODEL)
    assert torch.isfinite(drawn.latent).all()
    assert drawn.calls[0].timestep > 950 or name == "DDIMInverseScheduler"


def test_schedulers_built_alike_share_no_state() -> None:
    wanted = wish("UniPCMultistepScheduler", 5)
    one, other = (build_scheduler(MODEL.config, wanted, 1) for _ in range(2))
    latent = torch.ones(1, 4, 2, 2)
    one.step(latent, one.timesteps[0], latent)
    assert (one.step_index, other.step_index) == (1, None)
    assert all(output is None for output in other.model_outputs)
    assert one.sigmas.data_ptr() != other.sigmas.data_ptr()


def test_karras_sigmas_replace_those_of_the_base() -> None:
    config = {**MODEL.config, "use_exponential_sigmas": True}
    asked, not_asked = (
        build_scheduler(config, wish("EulerDiscreteScheduler", 5, use_karras_sigmas=flag), 1).config
        for flag in (True, False)
    )
    assert (asked.use_karras_sigmas, asked.use_exponential_sigmas) == (True, False)
    assert (not_asked.use_karras_sigmas, not_asked.use_exponential_sigmas) == (False, True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_few_steps_are_enough_to_end(name: str, mode: Mode, steps: int) -> None:
    if mode is Mode.TEXT and SCHEDULERS[name].needs_image:
        return
    source = MODEL.source(8)
    if mode is Mode.TEXT:
        source = replace(source, image=None)
    if mode is Mode.MASKED:
        source = replace(source, mask=torch.ones(1, 1, 8, 8))
    for use_karras in {False, SCHEDULERS[name].karras}:
        wanted = wish(name, steps, mode=mode, strength=0.9, use_karras_sigmas=use_karras)
        drawn = answer(sampler(MODEL.config, wanted, source, 1), MODEL)
        assert torch.isfinite(drawn.latent).all()
        assert float(drawn.latent.abs().max()) < 100
        assert all(0 <= call.timestep < 1000 for call in drawn.calls)


# Planted faults: the moments must tell. Those of an inversion never do: it undoes whatever the model says.


def squared(call: ModelCall, number: int) -> ModelCall:
    """Takes sigma for its square."""
    del number
    sigma = sigma_at(call.timestep)
    return replace(call, timestep=float(np.interp(2 * np.log(sigma), np.log(SIGMAS), np.arange(len(SIGMAS)))))


def unscaled(call: ModelCall, number: int) -> ModelCall:
    """Forgets ``scale_model_input``."""
    del number
    return replace(call, latent=call.latent * (1 + sigma_at(call.timestep) ** 2) ** 0.5)


@pytest.mark.parametrize("fault", [squared, unscaled])
@pytest.mark.parametrize("name", [name for name in SPREAD_TOLERANCE if not SCHEDULERS[name].needs_image])
def test_faults_show_in_the_moments(name: str, fault: Callable[[ModelCall, int], ModelCall]) -> None:
    asking = sampler(MODEL.config, wish(name, 30), MODEL.source(32), 1)
    latent = answer(altered(asking, fault), MODEL).latent
    with pytest.raises(AssertionError):
        check_moments(name, latent)


# Samplers that no pipeline of diffusers drives, against recursions written from the papers, in float64.


def noises(seed: int, count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """What a text-to-image sampler of this seed draws, in order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [randn_tensor(shape, generator=generator).double() for _ in range(count)]


def denoised(x: Tensor, sigma: float) -> Tensor:
    """The expectation of x0 for x = x0 + sigma noise."""
    return (MODEL.spread**2 * x + sigma**2 * MODEL.mean) / (MODEL.spread**2 + sigma**2)


def from_noise(name: str, steps: int) -> Drawn:
    source = replace(MODEL.source(16), image=None)
    return answer(sampler(MODEL.config, wish(name, steps, mode=Mode.TEXT), source, 5), MODEL)


def falling(steps: int) -> list[float]:
    ratio = (SIGMAS[0] / SIGMAS[-1]) ** (1 / (steps - 1))
    return [*(float(SIGMAS[-1] * ratio**i) for i in range(steps)), 0.0]


def test_karras_ve_is_algorithm_2_of_karras_et_al() -> None:
    steps = 9
    first, *churn = noises(5, steps + 1, (1, 4, 16, 16))
    sigmas = falling(steps)
    x = sigmas[0] * first
    for (sigma, lower), noise in zip(itertools.pairwise(sigmas), churn, strict=True):
        gamma = min(80 / steps, 2**0.5 - 1) if 0.05 <= sigma <= SIGMAS[-1] / 2**0.5 else 0.0
        raised = sigma * (1 + gamma)
        x = x + (raised**2 - sigma**2) ** 0.5 * noise
        slope = (x - denoised(x, raised)) / raised
        end = x + (lower - raised) * slope
        if lower > 0:
            end = x + (lower - raised) * (slope + (end - denoised(end, lower)) / lower) / 2
        x = end
    assert relative_error(from_noise("KarrasVeScheduler", steps).latent.double(), x) < 1e-5


def test_score_sde_ve_is_algorithm_2_of_song_et_al() -> None:
    steps = 9
    first, *more = noises(5, 2 * steps + 1, (1, 4, 16, 16))
    sigmas = falling(steps)
    x = sigmas[0] * first
    for step, (sigma, lower) in enumerate(itertools.pairwise(sigmas)):
        score = (denoised(x, sigma) - x) / sigma**2
        size = 2 * (0.15 * more[2 * step].norm() / score.norm()) ** 2
        x = x + size * score + (2 * size) ** 0.5 * more[2 * step]
        fall = sigma**2 - lower**2
        mean = x + fall * (denoised(x, sigma) - x) / sigma**2
        x = mean + fall**0.5 * more[2 * step + 1]
    assert relative_error(from_noise("ScoreSdeVeScheduler", steps).latent.double(), mean) < 1e-5


def test_ipndm_is_adams_bashforth_in_sigma() -> None:
    """x / a has the noise as its slope over sigma; four of them at most, with the weights for equal distances."""
    steps = 9
    times = [1 + 111 * i for i in reversed(range(steps))]
    a = [*np.sqrt(ALPHA_BAR[times]), 1.0]
    sigmas = [*SIGMAS[times], 0.0]
    (first,) = noises(5, 1, (1, 4, 16, 16))
    x = first / a[0]
    slopes: list[Tensor] = []
    weights = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    for sigma, lower in itertools.pairwise(sigmas):
        slopes = [(x - denoised(x, sigma)) / sigma, *slopes[:3]]
        used = weights[len(slopes) - 1]
        x = x + (lower - sigma) * sum(weight * slope for weight, slope in zip(used, slopes, strict=True))
    drawn = from_noise("IPNDMScheduler", steps)
    assert drawn.timesteps == times
    assert relative_error(drawn.latent.double(), x) < 1e-5


# DDIM inversion


@pytest.mark.parametrize("model", [MODEL, V_MODEL], ids=["epsilon", "v"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_an_inverted_image_comes_back(strength: float, model: GaussianModel) -> None:
    wanted = wish("DDIMInverseScheduler", 20, strength=strength)
    source = model.source()
    assert relative_error(draw(model, wanted).latent, Draws(source, 1).latent(source.image)) <= 1e-3


def test_inversion_ends_in_noise_that_ddim_turns_into_the_image() -> None:
    """The turning point is no noise of the sampler's: it has the marginal of its level, and another image another."""
    drawn = draw(MODEL, wish("DDIMInverseScheduler", 20))
    top = drawn.calls[80]  # after 20 steps of four questions
    a2 = float(ALPHA_BAR[round(top.timestep)])
    assert float(top.latent.std()) == pytest.approx((a2 * MODEL.spread**2 + 1 - a2) ** 0.5, rel=0.12)
    other = draw(replace(MODEL, mean=0.9), wish("DDIMInverseScheduler", 20)).calls[80]
    assert relative_error(other.latent, top.latent) > 1e-3


def test_the_way_up_asks_without_guidance_and_in_the_windows_of_the_way_down() -> None:
    calls = draw(MODEL, wish("DDIMInverseScheduler", 10, strength=0.5)).calls
    up, down = calls[:20], calls[20:]
    assert all(call.conditional_only for call in up)
    assert not any(call.conditional_only for call in down)
    assert [call.index for call in down] == list(range(5))
    assert {call.of for call in calls} == {5}
    assert {(call.timestep, call.index) for call in up} == {(call.timestep, call.index) for call in down}


@pytest.mark.parametrize("name", [name for name, spec in SCHEDULERS.items() if spec.needs_image])
def test_without_an_image_there_is_nothing_to_invert(name: str) -> None:
    for wanted in (wish(name, 5, mode=Mode.TEXT), wish(name, 5)):
        with pytest.raises(JobError, match="needs an init_image"):
            sampler(MODEL.config, wanted, replace(MODEL.source(8), image=None), 1)


def test_unknown_names_and_predictions_are_refused() -> None:
    with pytest.raises(JobError, match="EulerDiscreteScheduler"):
        sampler(MODEL.config, wish("Nonsense", 5), MODEL.source(8), 1)
    config = {**MODEL.config, "prediction_type": "flow_prediction"}
    with pytest.raises(JobError, match="Allowed: epsilon, v_prediction, sample"):
        next(sampler(config, wish("KarrasVeScheduler", 5), MODEL.source(8), 1))


def windows(wanted: GenerationTask) -> tuple[int, int]:
    calls = draw(MODEL, wanted, side=8).calls
    assert [call.index for call in calls] == list(range(len(calls)))
    assert {call.of for call in calls} == {len(calls)}
    return len(calls), calls[0].of


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [
        ("KarrasVeScheduler", 2 * 7 - 1),
        ("ScoreSdeVeScheduler", 2 * 7),
        ("IPNDMScheduler", 7),
        ("HeunDiscreteScheduler", 13),
    ],
)
def test_control_windows_are_fractions_of_all_evaluations(name: str, evaluations: int) -> None:
    assert windows(wish(name, 10, strength=0.7)) == (evaluations, evaluations)


def test_the_brownian_noise_of_a_picture_is_its_seeds() -> None:
    wanted = wish("DPMSolverSDEScheduler", 5)
    first, again = (draw(MODEL, wanted, seed=1, side=16) for _ in range(2))
    assert torch.equal(first.latent, again.latent)
    one, other = (build_scheduler(MODEL.config, wanted, seed).noise_sampler_seed for seed in (1, 2))
    assert (one, other) == (1, 2)
