"""IPNDM on Stable Diffusion's noise levels.

diffusers' class makes betas and timesteps of its own (a cosine over 0..1), asks for v and cannot noise an image. It is
right for this model with the model's own levels in place of its betas, the model's timesteps, and v for its output.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, IPNDMScheduler
from torch import Tensor

from serve_app.engine.samplers.calls import Sampler, Source
from serve_app.engine.samplers.levels import Levels
from serve_app.engine.samplers.steps import drive
from serve_app.tasks import GenerationTask


def ipndm(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """The fourth-order multistep sampler of https://huggingface.co/papers/2202.09778."""
    scheduler = _OnModelLevels(config)
    scheduler.set_timesteps(task.steps)
    return (yield from drive(scheduler, task, source, seed))


class _OnModelLevels:
    """``IPNDMScheduler`` with the interface that diffusers' pipelines expect of a scheduler."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._levels = Levels(config)
        self._config = config
        self._scheduler = IPNDMScheduler()
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, steps: int) -> None:
        """The timesteps that DDIM has on this model, and noise levels to match, down to 0."""
        spaced = DDIMScheduler.from_config(dict(self._config))
        spaced.set_timesteps(steps, device="cpu")
        self.timesteps = spaced.timesteps
        self._alpha_bar = self._levels.alpha_bar[self.timesteps]
        sigmas = [*(1 - self._alpha_bar).sqrt().tolist(), 0.0]
        self._scheduler = IPNDMScheduler(trained_betas=sigmas)
        self._scheduler.set_timesteps(steps, device="cpu")
        self.set_begin_index(0)

    def set_begin_index(self, begin: int) -> None:
        self._scheduler.set_begin_index(begin)
        self._begin = begin

    def scale_model_input(self, latent: Tensor, timestep: Tensor) -> Tensor:  # noqa: ARG002  - the interface's
        return latent

    def step(self, prediction: Tensor, timestep: Tensor, latent: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        alpha_bar = self._levels.alpha_bar[timestep]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        epsilon = self._levels.epsilon(prediction, latent, sigma / alpha)
        v = (epsilon - sigma * latent) / alpha
        return self._scheduler.step(v, timestep, latent, return_dict=return_dict)

    def add_noise(self, image: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha_bar = self._levels.alpha_bar[timesteps].to(image.device, image.dtype)[:, None, None, None]
        return alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
