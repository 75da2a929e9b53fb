"""At which timesteps every sampler asks, and how much noise is in the latent it asks about.

Both are derived here from the published formulas, not from the schedulers' methods. The noise is measured: on data that
is zero everywhere the noise in a latent is the latent itself, scaled to 1, at whatever level it is.
"""

import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.samplers import ModelCall, Sampler, sampler
from serve_app.engine.samplers.steps import drive
from serve_app.schedulers import SCHEDULERS
from support.closed_form import ALPHA_BAR, SIGMAS, TRAIN_STEPS, Drawn, GaussianModel, altered, answer, wish

STEPS = 12
ZERO = GaussianModel(mean=0.0, spread=0.0)
Levels = list[tuple[float, float]]
"""(timestep, sigma) of every evaluation."""
Times = NDArray[np.float64]


def timestep_at(sigma: float) -> float:
    return float(np.interp(np.log(sigma), np.log(SIGMAS), np.arange(TRAIN_STEPS)))


def leading(n: int) -> Times:
    """Multiples of T // n, plus SD's offset of one."""
    return np.array([1.0 + TRAIN_STEPS // n * i for i in reversed(range(n))])


def linspace(n: int) -> Times:
    return np.linspace(TRAIN_STEPS - 1, 0, n)


def whole(n: int) -> Times:
    """The integers next to n + 1 equal parts, without the 0 at the end."""
    return np.linspace(TRAIN_STEPS - 1, 0, n + 1).round()[:-1]


def distilled(n: int) -> Times:
    """LCM: of the 50 timesteps that it was distilled on, n at equal distances."""
    return np.array([20.0 * (50 - i * 50 // n) - 1 for i in range(n)])


def karras(n: int) -> Times:
    """Sigmas of Karras et al. 2022, equation 5, rho = 7."""
    ramp = np.linspace(SIGMAS[-1] ** (1 / 7), SIGMAS[0] ** (1 / 7), n)
    return ramp**7


def geometric(n: int) -> Times:
    """Where sigmas at equal ratios, from the highest to the lowest, are."""
    sigmas = np.exp(np.linspace(np.log(SIGMAS[-1]), np.log(SIGMAS[0]), n))
    return np.array([timestep_at(sigma) for sigma in sigmas])


def sigmas_at(times: Times) -> Times:
    """Schedulers that space their timesteps evenly interpolate sigma itself between whole ones, not its logarithm."""
    return np.interp(times, np.arange(TRAIN_STEPS), SIGMAS)


def once(times: Times, sigmas: Times) -> Levels:
    return list(zip(times.tolist(), sigmas.tolist(), strict=True))


def second_twice(times: Times, sigmas: Times) -> Levels:
    """PNDM improves its first step by a second look from its end."""
    levels = once(times, sigmas)
    return [*levels[:2], *levels[1:]]


def heun(times: Times, sigmas: Times) -> Levels:
    """At both ends of each step, but for the last, which ends at 0."""
    levels = once(times, sigmas)
    return [levels[0], *(level for level in levels[1:] for _ in range(2))]


def ancestral_end(sigma: float, lower: float) -> float:
    """How far down an ancestral step goes before it adds noise."""
    return float(np.sqrt(lower**2 - lower**2 * (sigma**2 - lower**2) / sigma**2))


def midpoints(times: Times, sigmas: Times, end: Callable[[float, float], float] = lambda _, lower: lower) -> Levels:
    """At the start of each step and half way down it, in log sigma."""
    levels = once(times, sigmas)
    halves = [float(np.sqrt(high * end(high, low))) for high, low in itertools.pairwise(sigmas.tolist())]
    between = [(timestep_at(half), half) for half in halves]
    return [levels[0], *(each for pair in zip(between, levels[1:], strict=True) for each in pair)]


def midpoints_ancestral(times: Times, sigmas: Times) -> Levels:
    return midpoints(times, sigmas, ancestral_end)


def churned(times: Times, sigmas: Times) -> Levels:
    """KarrasVe: each step from a level raised by sqrt(2) where that is allowed, corrected at its end."""
    del times
    raised = [sigma * 2**0.5 if 0.05 <= sigma <= SIGMAS[-1] / 2**0.5 else sigma for sigma in sigmas.tolist()]
    pairs = zip(raised, [*sigmas[1:].tolist(), 0.0], strict=True)
    return [(timestep_at(sigma), sigma) for pair in pairs for sigma in pair if sigma > 0]


def corrected(times: Times, sigmas: Times) -> Levels:
    """ScoreSdeVe: corrector and predictor at the same level."""
    return [level for level in once(times, sigmas) for _ in range(2)]


def inverted(times: Times, sigmas: Times) -> Levels:
    """DDIMInverse: four times at each timestep on the way up, first about the level below; once on the way down."""
    down = once(times, sigmas)
    floor = float(SIGMAS[0])
    below = [*sigmas[1:].tolist(), floor]
    up = [
        (time, lower if attempt == 0 else sigma)
        for (time, sigma), lower in reversed(list(zip(down, below, strict=True)))
        for attempt in range(4)
    ]
    return up + down


@dataclass(frozen=True)
class Row:
    times: Callable[[int], Times]
    pattern: Callable[[Times, Times], Levels] = once
    noisy: bool = False
    """Draws noise on the way, so that levels are right up to chance."""
    whole_karras: bool = False
    """Rounds the timesteps of Karras sigmas."""
    overshoots: bool = False
    """Keeps more noise than its level with so few steps; its recursion is checked instead (test_samplers.py)."""


MULTISTEP = Row(whole, whole_karras=True)

ROWS: Mapping[str, Row] = {
    "DDPMScheduler": Row(leading, noisy=True),
    "DDIMScheduler": Row(leading),
    "PNDMScheduler": Row(leading, second_twice),
    "LMSDiscreteScheduler": Row(linspace),
    "EulerDiscreteScheduler": Row(linspace),
    "EulerAncestralDiscreteScheduler": Row(linspace, noisy=True),
    "DPMSolverMultistepScheduler": MULTISTEP,
    "HeunDiscreteScheduler": Row(linspace, heun),
    "KDPM2DiscreteScheduler": Row(linspace, midpoints, whole_karras=True),
    "DPMSolverSinglestepScheduler": MULTISTEP,
    "KDPM2AncestralDiscreteScheduler": Row(linspace, midpoints_ancestral, noisy=True, whole_karras=True),
    "UniPCMultistepScheduler": MULTISTEP,
    "DDIMInverseScheduler": Row(leading, inverted),
    "DEISMultistepScheduler": MULTISTEP,
    "IPNDMScheduler": Row(leading),
    "KarrasVeScheduler": Row(geometric, churned, noisy=True),
    "ScoreSdeVeScheduler": Row(geometric, corrected, noisy=True, overshoots=True),
    "LCMScheduler": Row(distilled, noisy=True),
    "DPMSolverSDEScheduler": Row(linspace, midpoints, noisy=True),
}


def expected(name: str, use_karras: bool) -> Levels:
    row = ROWS[name]
    if not use_karras:
        times = row.times(STEPS)
        return row.pattern(times, sigmas_at(times))
    sigmas = karras(STEPS)
    times = np.array([timestep_at(sigma) for sigma in sigmas])
    return row.pattern(times.round() if row.whole_karras else times, sigmas)


def noise_level(sigma: float) -> float:
    """Of the latent that the model sees."""
    return float(sigma / np.sqrt(1 + sigma**2))


@dataclass
class Oracle:
    """Knows which level comes next, and that all that is in the latent is noise."""

    levels: Levels
    answered: int = 0

    def __call__(self, call: ModelCall) -> Tensor:
        _, sigma = self.levels[min(self.answered, len(self.levels) - 1)]
        self.answered += 1
        return call.latent / noise_level(sigma)


def asked(asking: Sampler, levels: Levels) -> Drawn:
    with torch.inference_mode():
        return answer(asking, Oracle(levels))


def sampled(name: str, use_karras: bool = False) -> Sampler:
    """An inversion starts from an image that has the noise of the lowest level already."""
    spread = noise_level(float(SIGMAS[0])) if SCHEDULERS[name].needs_image else 0.0
    source = replace(ZERO, spread=spread).source(64)
    return sampler(ZERO.config, wish(name, STEPS, use_karras_sigmas=use_karras), source, 3)


def check_sequence(drawn: Drawn, levels: Levels, row: Row) -> None:
    """Asserts that the sampler asked at these timesteps, about latents with this much noise."""
    assert len(drawn.calls) == len(levels)
    np.testing.assert_allclose(drawn.timesteps, [time for time, _ in levels], rtol=0, atol=2e-2)
    measured = np.array([float(call.latent.std()) for call in drawn.calls])
    noise = np.array([noise_level(sigma) for _, sigma in levels])
    if not row.noisy:  # whatever the first draw happened to be
        measured = measured / measured[-1] * noise[-1]
    if not row.overshoots:
        np.testing.assert_allclose(measured, noise, rtol=0.03 if row.noisy else 1e-3)


CASES = [(name, flag) for name, spec in SCHEDULERS.items() for flag in ((False, True) if spec.karras else (False,))]


@pytest.mark.parametrize(("name", "use_karras"), CASES)
def test_asks_at_the_published_timesteps_and_levels(name: str, use_karras: bool) -> None:
    levels = expected(name, use_karras)
    check_sequence(asked(sampled(name, use_karras), levels), levels, ROWS[name])


def test_the_table_is_covered_and_the_levels_are_those_of_stable_diffusion() -> None:
    assert set(ROWS) == set(SCHEDULERS)
    assert (round(float(SIGMAS[0]), 4), round(float(SIGMAS[-1]), 3)) == (0.0292, 14.615)
    assert ALPHA_BAR[-1] == pytest.approx(0.00466, abs=1e-5)


# Planted faults: what these checks are for must make them fail.


def late(call: ModelCall, number: int, levels: Levels) -> ModelCall:
    return replace(call, timestep=levels[min(number + 1, len(levels) - 1)][0])


def squared(call: ModelCall, number: int, levels: Levels) -> ModelCall:
    return replace(call, timestep=timestep_at(levels[number][1] ** 2))


def unscaled(call: ModelCall, number: int, levels: Levels) -> ModelCall:
    return replace(call, latent=call.latent * (1 + levels[number][1] ** 2) ** 0.5)


@pytest.mark.parametrize("fault", [late, squared])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_wrong_timesteps_are_found(name: str, fault: Callable[[ModelCall, int, Levels], ModelCall]) -> None:
    levels = expected(name, use_karras=False)
    asking = altered(sampled(name), lambda call, number: fault(call, number, levels))
    with pytest.raises(AssertionError):
        check_sequence(asked(asking, levels), levels, ROWS[name])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.overshoots])
def test_latents_of_a_wrong_scale_are_found(name: str) -> None:
    levels = expected(name, use_karras=False)
    asking = altered(sampled(name), lambda call, number: unscaled(call, number, levels))
    with pytest.raises(AssertionError):
        check_sequence(asked(asking, levels), levels, ROWS[name])


class SquaredSigmas(EulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)
        self.sigmas = self.sigmas**2  # type: ignore[has-type]


class LateTimesteps(EulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        super().set_timesteps(*arguments, **options)
        self.timesteps = self.timesteps[[*range(1, len(self.timesteps)), -1]]  # type: ignore[has-type]


class Unscaled(EulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        super().scale_model_input(sample, timestep)
        return sample


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, SquaredSigmas, LateTimesteps, Unscaled])
def test_faults_inside_a_scheduler_are_found(scheduler: Any) -> None:
    name = "EulerDiscreteScheduler"
    levels = expected(name, use_karras=False)
    built = scheduler.from_config(dict(ZERO.config))
    built.set_timesteps(STEPS)
    asking = drive(built, wish(name, STEPS), ZERO.source(64), 3)
    found = pytest.raises(AssertionError) if scheduler is not EulerDiscreteScheduler else nullcontext()
    with found:
        check_sequence(asked(asking, levels), levels, ROWS[name])
