"""The VAE's side of a latent: precision, shift and scale, as diffusers' pipelines treat them."""

from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from serve_app.models.components import BaseComponents


class EncodedImage(DiagonalGaussianDistribution):
    """An image through the VAE. Samples are (1, 4, h, w) in the base model's dtype, shifted but not yet scaled.

    The sample is drawn in the VAE's own dtype: random numbers differ between dtypes, not only in their last bit.
    """

    def __init__(self, base: BaseComponents, parameters: Tensor) -> None:
        super().__init__(parameters)
        self._base = base

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._shifted(super().sample(generator))

    def mode(self) -> Tensor:
        return self._shifted(super().mode())

    def _shifted(self, latent: Tensor) -> Tensor:
        latent = latent.to(self._base.dtype)
        shift = _shift(self._base, latent)
        return latent if shift is None else (latent - shift[0]) / shift[1]


def encode_image(base: BaseComponents, pixels: Tensor) -> EncodedImage:
    """``pixels``: (1, 3, H, W) in -1..1."""
    vae = _vae(base)
    return EncodedImage(base, vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.parameters)


def decode_latent(base: BaseComponents, latent: Tensor) -> Tensor:
    """(1, 4, h, w) as a sampler returns it -> (1, 3, H, W), about -1..1."""
    vae = _vae(base)
    latent = latent.to(vae.dtype)
    shift = _shift(base, latent)
    scale = vae.config.scaling_factor
    latent = latent / scale if shift is None else latent * shift[1] / scale + shift[0]
    pixels: Tensor = vae.decode(latent, return_dict=False)[0]
    return pixels


def _vae(base: BaseComponents) -> Any:
    """The VAE, in float32 where float16 would overflow it.

    SDXL's VAE says so with ``force_upcast``. Other families' say it too, for it is the default, and diffusers' XL
    pipelines alone heed it. It stays in float32 from then on: changing it for every picture would take longer than
    its extra 160 MB are worth.
    """
    if base.family == "sdxl" and base.vae.config.force_upcast and base.vae.dtype == torch.float16:
        torch.nn.Module.to(base.vae, dtype=torch.float32)
    return base.vae


def _shift(base: BaseComponents, latent: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation per channel, (1, c, 1, 1), of VAEs that publish them; SDXL fine-tunes do."""
    mean, std = base.vae.config.latents_mean, base.vae.config.latents_std
    if mean is None or std is None:
        return None
    return latent.new_tensor(mean).view(1, -1, 1, 1), latent.new_tensor(std).view(1, -1, 1, 1)
