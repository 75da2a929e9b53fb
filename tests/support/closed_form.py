"""A model whose every answer is known, and samplers driven with it.

Data N(mean, spread^2), independently in every cell: the noise expected in x = a x0 + sg noise, with a = sqrt(abar) and
sg = sqrt(1 - abar), is sg (x - a mean) / (a^2 spread^2 + sg^2). So a sampler that starts from the exact marginal has to
end in N(mean, spread^2), and what is left is its own error. abar is computed here, from SD's definition, in float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.samplers import ModelCall, Sampler, Source, sampler
from serve_app.tasks import GenerationTask, Mode
from support.tiny import SCHEDULER_CONFIG, task

TRAIN_STEPS = 1000
SIDE = 64
"""16384 cells: chance moves the mean by 0.008 spreads and the spread by 0.6%."""

ALPHA_BAR: NDArray[np.float64] = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS) ** 2)
SIGMAS: NDArray[np.float64] = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)
"""0.0292 .. 14.61, SD's."""


def sigma_at(timestep: float) -> float:
    """Between two timesteps sigma is geometric, as in k-diffusion and the schedulers made from it."""
    return float(np.exp(np.interp(timestep, np.arange(TRAIN_STEPS), np.log(SIGMAS))))


@dataclass(frozen=True)
class GaussianModel:
    """Answers for data N(mean, spread^2)."""

    mean: float = 0.5
    spread: float = 0.7
    prediction_type: str = "epsilon"

    def __call__(self, call: ModelCall) -> Tensor:
        sigma = sigma_at(call.timestep)
        a = (1 + sigma**2) ** -0.5
        sg = sigma * a
        epsilon: Tensor = sg * (call.latent - a * self.mean) / (a**2 * self.spread**2 + sg**2)
        if self.prediction_type == "epsilon":
            return epsilon
        v: Tensor = a * epsilon - sg * (call.latent - sg * epsilon) / a
        return v

    @property
    def config(self) -> Mapping[str, Any]:
        return {**SCHEDULER_CONFIG, "prediction_type": self.prediction_type}

    def source(self, side: int = SIDE) -> Source:
        """An init image whose every sample is drawn from the data."""
        half = torch.ones(1, 4, side, side)
        log_variance = 2 * np.log(max(self.spread, 1e-12))
        data = DiagonalGaussianDistribution(torch.cat([half * self.mean, half * log_variance], dim=1))
        return Source((1, 4, side, side), torch.device("cpu"), torch.float32, 1.0, data)


@dataclass(frozen=True)
class Drawn:
    """What a sampler asked and where it ended."""

    latent: Tensor
    calls: Sequence[ModelCall]

    @property
    def timesteps(self) -> list[float]:
        return [call.timestep for call in self.calls]


def answer(asking: Sampler, model: Callable[[ModelCall], Tensor]) -> Drawn:
    """Answer every question of a sampler."""
    calls = [next(asking)]
    while True:
        try:
            calls.append(asking.send(model(calls[-1])))
        except StopIteration as end:
            return Drawn(end.value, calls)


def altered(asking: Sampler, change: Callable[[ModelCall, int], ModelCall]) -> Sampler:
    """The same sampler with a fault: its questions are changed on their way. ``change(call, number of the call)``."""
    call, number = next(asking), 0
    while True:
        prediction = yield change(call, number)
        number += 1
        try:
            call = asking.send(prediction)
        except StopIteration as end:
            latent: Tensor = end.value
            return latent


def wish(scheduler: str, steps: int, **changes: Any) -> GenerationTask:
    """Image-to-image at strength 1: all steps, from the exact marginal."""
    return task(**{"scheduler": scheduler, "steps": steps, "mode": Mode.IMAGE, "strength": 1.0, **changes})


def draw(model: GaussianModel, wanted: GenerationTask, seed: int = 1, side: int = SIDE) -> Drawn:
    with torch.inference_mode():
        return answer(sampler(model.config, wanted, model.source(side), seed), model)
