"""What passes between a sampler and the engine, and what a sampler starts from."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


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
    done: float | None = None
    """Share of the sampler's evaluations that came before; None where ``index`` counts them."""

    @property
    def progress(self) -> float:
        """Share of the sampler's evaluations that came before, from 0 to below 1."""
        return self.index / self.of if self.done is None else self.done


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
