"""Where a picture starts, in diffusers' order of random draws, and what keeps the unmasked part of an init image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from serve_app.engine.samplers.calls import Source
from serve_app.tasks import GenerationTask, Mode


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """Keeps the unmasked part of the init image, for UNets that know nothing of masks."""

    image: Tensor
    noise: Tensor
    mask: Tensor

    def keep(self, kept: Tensor, latent: Tensor) -> Tensor:
        """``latent`` where the mask is, ``kept`` elsewhere; ``kept`` is the init image at the noise level reached."""
        return (1 - self.mask) * kept + self.mask * latent


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """The first latent, and what comes with it."""

    latent: Tensor
    blend: Blend | None = None
    """Of plain UNets in masked mode."""
    extra: Tensor | None = None
    """``ModelCall.extra`` of inpaint UNets."""


class Draws:
    """The random numbers of one picture."""

    def __init__(self, source: Source, seed: int) -> None:
        self._source = source
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def noise(self) -> Tensor:
        source = self._source
        return randn_tensor(source.shape, generator=self.generator, device=source.device, dtype=source.dtype)

    def latent(self, distribution: DiagonalGaussianDistribution) -> Tensor:
        """A sample of an encoded image, scaled."""
        return self._source.latent_scale * distribution.sample(self.generator)


def steps_to_run(task: GenerationTask) -> int:
    """Image tasks skip the first ``1 - strength`` of the steps but run one at least."""
    return task.steps if task.mode is Mode.TEXT else max(int(task.steps * task.strength), 1)


def start(
    task: GenerationTask,
    source: Source,
    draws: Draws,
    *,
    spread: float | Tensor,
    noised: Callable[[Tensor, Tensor], Tensor],
) -> Start:
    """The first latent of a picture.

    ``spread`` is the standard deviation of the first latent where nothing of an init image is in it; ``noised(image,
    noise)`` is the init image at the noise level of the first step.

    Draws: sample of the image, noise, sample of the masked image. A plain UNet does not use the last, but its place in
    the random sequence counts for schedulers that draw at every step.
    """
    if source.image is None:
        return Start(draws.noise() * spread)
    if source.mask is None:
        image, noise = draws.latent(source.image), draws.noise()
        return Start(noised(image, noise))
    if source.masked is None:
        image, noise = draws.latent(source.image), draws.noise()
        draws.noise()
        first = noised(image, noise) if task.strength < 1 else noise * spread
        return Start(first, blend=Blend(image, noise, source.mask))
    image = draws.latent(source.image) if task.strength < 1 else torch.zeros(())
    noise = draws.noise()
    first = noised(image, noise) if task.strength < 1 else noise * spread
    return Start(first, extra=torch.cat([source.mask, draws.latent(source.masked)], dim=1))
