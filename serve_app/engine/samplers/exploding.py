"""Variance-exploding samplers on a variance-preserving model.

Their latent is x = x0 + sigma noise; the model knows x / sqrt(1 + sigma^2), at the timestep whose sigma that is. The
classes' own sigma ranges (up to 100 and 1348) fit other models: here it is the base model's. At sigma 0 the two
forms meet, so that the final latent is like everybody's.

The latent is float32 throughout: at the highest sigma half precision leaves no digits for the picture.
"""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from diffusers import KarrasVeScheduler, ScoreSdeVeScheduler
from torch import Tensor

from serve_app.engine.samplers.calls import ModelCall, Sampler, Source
from serve_app.engine.samplers.levels import Levels
from serve_app.engine.samplers.start import Draws, Start, start, steps_to_run
from serve_app.tasks import GenerationTask


class _Canvas:
    """What the two samplers share: the run of sigmas, the start, the mask and the questions to the model."""

    def __init__(self, config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> None:
        self.levels = Levels(config)
        every = self.levels.geometric(task.steps)
        self.sigmas = every[task.steps - steps_to_run(task) :]
        """From the first that is run to 0, one more than there are steps."""
        self.draws = Draws(source, seed)
        self._dtype = source.dtype
        self._start: Start = start(
            task,
            source,
            self.draws,
            spread=self.sigmas[0],
            noised=lambda image, noise: image + self.sigmas[0] * noise,
        )

    @property
    def first(self) -> Tensor:
        return self._start.latent.float()

    def epsilon(self, latent: Tensor, sigma: float, index: int, of: int) -> Generator[ModelCall, Tensor, Tensor]:
        """Ask the model for the noise in ``latent``; ``index`` and ``of`` count evaluations."""
        seen = latent * (1 + sigma**2) ** -0.5
        call = ModelCall(seen.to(self._dtype), self.levels.timestep(sigma), index, of, self._start.extra)
        prediction = yield call
        return self.levels.epsilon(prediction.float(), seen, sigma)

    def keep(self, latent: Tensor, sigma: float) -> Tensor:
        """Put the init image, with noise of this level, back where the mask is not."""
        blend = self._start.blend
        return latent if blend is None else blend.keep(blend.image + sigma * blend.noise, latent)

    def final(self, latent: Tensor) -> Tensor:
        return latent.to(self._dtype)


def karras_ve(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """Karras et al. 2022, algorithm 2 (https://huggingface.co/papers/2206.00364): churn, Euler, Heun's correction.

    The class predates the epsilon convention: its model output is x0 - x over sigma, so the sign turns. Its table of
    ``schedule`` holds squares of sigma. Churn may not lift the noise above what the model knows, hence ``s_max``, and
    adds exactly the noise that the level asks for, hence ``s_noise``.

    2n - 1 evaluations: the step to sigma 0 has no correction.
    """
    canvas = _Canvas(config, task, source, seed)
    scheduler = KarrasVeScheduler(s_noise=1.0, s_max=canvas.levels.sigma_max / 2**0.5)
    scheduler.num_inference_steps = task.steps
    evaluations = 2 * (len(canvas.sigmas) - 1) - 1
    latent = canvas.first
    for step, (sigma, lower) in enumerate(zip(canvas.sigmas, canvas.sigmas[1:], strict=False)):
        churned, raised = scheduler.add_noise_to_input(latent, sigma, canvas.draws.generator)
        epsilon = yield from canvas.epsilon(churned, raised, 2 * step, evaluations)
        latent, slope = scheduler.step(-epsilon, raised, lower, churned, return_dict=False)
        latent = canvas.keep(latent, lower)
        if lower > 0:
            epsilon = yield from canvas.epsilon(latent, lower, 2 * step + 1, evaluations)
            latent, _ = scheduler.step_correct(-epsilon, raised, lower, churned, latent, slope, return_dict=False)
            latent = canvas.keep(latent, lower)
    return canvas.final(latent)


def score_sde_ve(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """Song et al. 2021, algorithm 2 (https://huggingface.co/papers/2011.13456): one correction before each prediction.

    The model output is the score, -epsilon / sigma. The last prediction's mean is the picture: the noise on top of it
    would stay. 2n evaluations.
    """
    canvas = _Canvas(config, task, source, seed)
    scheduler = ScoreSdeVeScheduler()
    scheduler.set_timesteps(task.steps, device="cpu")
    ascending = canvas.levels.geometric(task.steps)[-2::-1]
    scheduler.discrete_sigmas = torch.tensor(ascending, dtype=torch.float32)
    evaluations = 2 * (len(canvas.sigmas) - 1)
    latent = canvas.first
    for step, (sigma, lower) in enumerate(zip(canvas.sigmas, canvas.sigmas[1:], strict=False)):
        epsilon = yield from canvas.epsilon(latent, sigma, 2 * step, evaluations)
        latent = scheduler.step_correct(-epsilon / sigma, latent, canvas.draws.generator, return_dict=False)[0]
        latent = canvas.keep(latent, sigma)
        epsilon = yield from canvas.epsilon(latent, sigma, 2 * step + 1, evaluations)
        remaining = len(canvas.sigmas) - 2 - step
        # The class finds its sigma at floor(position * (n - 1)); half a step more keeps rounding out of it.
        position = (remaining + 0.5) / max(task.steps - 1, 1)
        latent, mean = scheduler.step_pred(
            -epsilon / sigma, position, latent, canvas.draws.generator, return_dict=False
        )
        latent = canvas.keep(latent if lower > 0 else mean, lower)
    return canvas.final(latent)
