"""Samplers: from noise to a finished latent, one picture at a time.

A sampler is a generator: it yields a ``ModelCall`` whenever it needs the model's prediction and is sent the guided
prediction for it. The engine answers calls of many samplers with one forward; a sampler knows nothing of batches,
guidance or ControlNets. diffusers' schedulers are stateful, so every sampler owns one.

The order of random draws, the mask blend and the start index follow diffusers 0.42 (``pipeline_controlnet*.py``,
``pipeline_stable_diffusion_inpaint.py``): a picture equals the one its pipeline would draw.
"""

import inspect
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from serve_app.errors import JobError
from serve_app.schedulers import SCHEDULERS, scheduler_problem
from serve_app.tasks import GenerationTask, Mode

_SPELLING = {"dpmsolver+++": "dpmsolver++"}
"""``algorithm_type`` of the API -> of diffusers, where they differ."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelCall:
    """A question to the model: what does it predict for ``latent`` at ``timestep``?"""

    latent: Tensor
    """(1, 4, h, w), already scaled by the scheduler: what the UNet and the ControlNets see."""
    timestep: float
    index: int
    """Position in the sampler's timesteps."""
    of: int
    """How many timesteps the sampler has; control windows are fractions of it."""
    extra: Tensor | None = None
    """(1, 5, h, w): mask and masked image that an inpaint UNet takes beside the latent."""
    conditional_only: bool = False
    """Ask for the conditional row alone, unguided, whatever the request's guidance: inversions run without it."""


Sampler = Generator[ModelCall, Tensor, Tensor]
"""Yields calls, is sent predictions (1, 4, h, w), returns the final latent (1, 4, h, w), not yet unscaled."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What the pictures of one request start from. Everything is (1, c, h, w) in latent cells."""

    shape: tuple[int, int, int, int]
    """(1, 4, h, w) of the latent."""
    device: torch.device
    dtype: torch.dtype
    latent_scale: float
    """The VAE's ``scaling_factor``."""
    image: DiagonalGaussianDistribution | None = None
    """The init image through the VAE; every picture draws its own sample of it."""
    mask: Tensor | None = None
    """1 = repaint, 0 = keep."""
    masked: DiagonalGaussianDistribution | None = None
    """The init image with its masked part blanked, for UNets that take it as input; else None."""


@dataclass(frozen=True, slots=True, eq=False)
class _Blend:
    """Keeps the unmasked part of the init image, for UNets that know nothing of masks."""

    image: Tensor
    noise: Tensor
    mask: Tensor


def build_scheduler(config: Mapping[str, Any], task: GenerationTask) -> Any:
    """A fresh diffusers scheduler for ``task`` on the base model's scheduler ``config``.

    Raises:
        JobError: the scheduler's name is not served.
    """
    problem = scheduler_problem(task.scheduler)
    if problem is not None:
        raise JobError(problem)
    spec = SCHEDULERS[task.scheduler]
    options = dict(spec.options)
    if spec.karras:
        options["use_karras_sigmas"] = task.use_karras_sigmas
    if task.algorithm_type in spec.algorithm_types:
        options["algorithm_type"] = _SPELLING.get(task.algorithm_type, task.algorithm_type)
    return getattr(diffusers, spec.class_name).from_config(dict(config), **options)


def sampler(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """The sampler of one picture of ``task``.

    ``config`` is the base model's scheduler config. Nothing is drawn before the first ``next()``.
    Raises what ``build_scheduler`` and the scheduler raise.
    """
    scheduler = build_scheduler(config, task)
    # Timesteps stay on the CPU: schedulers look indices up by value, which would wait for the GPU at every step.
    scheduler.set_timesteps(task.steps, device="cpu")
    timesteps = _timesteps(scheduler, task)
    generator = torch.Generator("cpu").manual_seed(seed)
    latent, blend, extra = _start(scheduler, timesteps, task, source, generator)
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": 0.0, "generator": generator}
    options = {name: value for name, value in options.items() if name in accepted}

    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latent, timestep)
        prediction = yield ModelCall(scaled, float(timestep), index, len(timesteps), extra)
        latent = scheduler.step(prediction, timestep, latent, **options, return_dict=False)[0]
        if blend is not None:
            kept = blend.image
            if index + 1 < len(timesteps):
                kept = scheduler.add_noise(kept, blend.noise, timesteps[index + 1 : index + 2])
            latent = (1 - blend.mask) * kept + blend.mask * latent
    return latent


def _timesteps(scheduler: Any, task: GenerationTask) -> Tensor:
    """The timesteps to run, (n,); image tasks skip the first ``1 - strength`` of the steps but run one at least."""
    timesteps: Tensor = scheduler.timesteps
    if task.mode is Mode.TEXT:
        return timesteps
    run = max(int(task.steps * task.strength), 1)
    begin = (task.steps - run) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # DDIM finds its place by the timestep's value and has none
        scheduler.set_begin_index(begin)
    return timesteps[begin:]


def _start(
    scheduler: Any, timesteps: Tensor, task: GenerationTask, source: Source, generator: torch.Generator
) -> tuple[Tensor, _Blend | None, Tensor | None]:
    """The first latent, the mask blend of plain UNets, the extra channels of inpaint UNets.

    Draws in diffusers' order: sample of the image, noise, sample of the masked image. A plain UNet does not use the
    last, but its place in the random sequence counts for schedulers that draw at every step.
    """

    def normal() -> Tensor:
        return randn_tensor(source.shape, generator=generator, device=source.device, dtype=source.dtype)

    def encoded(distribution: DiagonalGaussianDistribution) -> Tensor:
        return source.latent_scale * distribution.sample(generator)

    if source.image is None:
        return normal() * scheduler.init_noise_sigma, None, None
    if source.mask is None:
        image, noise = encoded(source.image), normal()
        return scheduler.add_noise(image, noise, timesteps[:1]), None, None
    if source.masked is None:
        image, noise = encoded(source.image), normal()
        normal()
        start = _noised(scheduler, timesteps, task, image, noise)
        return start, _Blend(image, noise, source.mask), None
    image = encoded(source.image) if task.strength < 1 else torch.zeros(())
    start = _noised(scheduler, timesteps, task, image, normal())
    return start, None, torch.cat([source.mask, encoded(source.masked)], dim=1)


def _noised(scheduler: Any, timesteps: Tensor, task: GenerationTask, image: Tensor, noise: Tensor) -> Tensor:
    """Where a masked picture starts: from pure noise at strength 1, else from the init image with noise on it."""
    if task.strength < 1:
        return scheduler.add_noise(image, noise, timesteps[:1])
    return noise * scheduler.init_noise_sigma
