"""First stages: the autoencoder learns to give back scenes, and smooth noise so that photos don't surprise it.

Crops of large pictures are cheap and sharp, but GroupNorm's statistics are not a crop's and colours of whole pictures
would be wrong: so every other batch is whole. Once the latents are good the encoder stays as it is, so that the next
stages can start, and the decoder goes on learning alone.
"""

from functools import partial

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from serve_app.models.demo.networks import make_vae
from serve_app.models.demo.scenes import render, sample_scene
from serve_app.tasks import ImageArray

BATCHES: tuple[tuple[int, int], ...] = ((128, 4), (256, 1), (128, 4), (256, 1), (128, 4), (512, 1))
"""Side and number of pictures in a batch, by turns. Those of ``CROP`` are cut out of larger ones."""
CROP = 128
DECODER_BATCHES: tuple[tuple[int, int], ...] = ((128, 4), (256, 2), (128, 4), (512, 1))
_KL = 1e-4
_EDGES = 1.0
_NOISE_PICTURES = 0.15


class AutoencoderStage:
    """L1 of pixels and of their differences, and a faint pull of the latents towards a normal distribution."""

    name = "autoencoder"
    seed = 11
    batches = BATCHES

    def __init__(self, *, bf16: bool) -> None:
        torch.manual_seed(self.seed)
        self.trained: torch.nn.Module = make_vae(self.seed)
        self.vae = self.trained
        self.bf16 = bf16

    def loss(self, step: int, random: np.random.Generator) -> Tensor:
        pixels = _batch(*self.batches[step % len(self.batches)], random)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            latents = self.vae.encode(pixels).latent_dist
            decoded = self.vae.decode(latents.sample()).sample.float()
        kl = latents.kl().mean() / latents.mean[0].numel()
        loss: Tensor = (decoded - pixels).abs().mean() + _EDGES * _edge_error(decoded, pixels) + _KL * kl
        return loss


class DecoderStage(AutoencoderStage):
    """The decoder alone, behind an encoder that stays as it is."""

    name = "decoder"
    seed = 12
    batches = DECODER_BATCHES

    def __init__(self, vae: AutoencoderKL, *, bf16: bool) -> None:
        self.vae = vae
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        self.trained = decoder_of(vae)
        self.bf16 = bf16


def decoder_of(vae: AutoencoderKL) -> torch.nn.ModuleList:
    return torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])


def _batch(side: int, count: int, random: np.random.Generator) -> Tensor:
    draw = _crop if side == CROP else partial(_picture, side)
    return as_pixels([draw(random) for _ in range(count)])


def as_pixels(images: list[ImageArray]) -> Tensor:
    """Pictures (H, W, 3) uint8 to (B, 3, H, W) in -1..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _crop(random: np.random.Generator) -> ImageArray:
    side = int(random.choice([128, 256, 512]))
    image = _picture(side, random)
    y, x = random.integers(0, side - CROP + 1, size=2)
    return image[y : y + CROP, x : x + CROP]


def _picture(side: int, random: np.random.Generator) -> ImageArray:
    if random.random() < _NOISE_PICTURES:
        return _noise(side, random)
    return render(sample_scene(random), side, side).image


def _noise(side: int, random: np.random.Generator) -> ImageArray:
    """Three octaves of random colours, smoothly enlarged, about as rough as an out-of-focus photo."""
    total: NDArray[np.float64] = np.full((side, side, 3), 128.0)
    for cells, strength in ((3, 130.0), (8, 70.0), (side // 16, 40.0)):
        grid = random.uniform(-1, 1, size=(cells, cells, 3))
        total += strength * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
    image: ImageArray = total.clip(0, 255).astype(np.uint8)
    return image


def _edge_error(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Mean L1 between the differences of neighbouring pixels, along both axes."""
    return sum((decoded.diff(dim=axis) - pixels.diff(dim=axis)).abs().mean() for axis in (2, 3))  # type: ignore[return-value]
