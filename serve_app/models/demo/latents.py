"""Latents of the training scenes, computed once, so that the later stages never run the autoencoder.

A set is (scenes, 4, side/8, side/8) float16 of one picture side; scene i of a set is drawn from the seed (side, i).
Sets are filled in shards by any number of processes, each of which continues where it was stopped.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from serve_app.models.demo.autoencoder import as_pixels
from serve_app.models.demo.networks import CELL, LATENT_CHANNELS
from serve_app.models.demo.scenes import Scene, render, sample_scene

_SHARD = 100


def scene_of(side: int, index: int) -> Scene:
    return sample_scene(np.random.default_rng((side, index)))


def standardise(vae: AutoencoderKL, side: int = 256, scenes: int = 64) -> None:
    """Give every latent channel mean 0 and variance 1 over training scenes, by the two 1x1 convolutions around it.

    Noise schedules take that for granted; with it the scaling factor is 1.
    """
    with torch.no_grad():
        pixels = [render(scene_of(side, index), side, side).image for index in range(scenes)]
        means = torch.cat([vae.encode(as_pixels([image])).latent_dist.mean for image in pixels])
        mean, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
        out, back = vae.quant_conv, vae.post_quant_conv
        out.weight[:LATENT_CHANNELS] /= spread[:, None, None, None]
        out.bias[:LATENT_CHANNELS] = (out.bias[:LATENT_CHANNELS] - mean) / spread
        out.bias[LATENT_CHANNELS:] -= 2 * spread.log()  # the log variance
        back.bias += (back.weight[:, :, 0, 0] * mean).sum(dim=1)
        back.weight *= spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def fill(
    vae: AutoencoderKL, folder: Path, side: int, count: int, *, worker: int = 0, workers: int = 1,
    report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Encode the shards of one set that fall to ``worker`` of ``workers`` and are not there yet."""
    for start in range(worker * _SHARD, count, workers * _SHARD):
        path = folder / str(side) / f"{start:06}.npy"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        shape = (min(_SHARD, count - start), LATENT_CHANNELS, side // CELL, side // CELL)
        shard = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        for row in range(len(shard)):
            image = render(scene_of(side, start + row), side, side).image
            with torch.no_grad():
                shard[row] = vae.encode(as_pixels([image])).latent_dist.mean[0].numpy()
        shard.flush()
        partial.rename(path)
        report(f"latents {side}: {start + len(shard)}/{count}")


def load(folder: Path, side: int) -> NDArray[np.float16]:
    """Every scene of one set, (scenes, 4, h, w)."""
    shards = [np.load(path) for path in sorted((folder / str(side)).glob("*.npy"))]
    if not shards:
        raise FileNotFoundError(f"{folder / str(side)}: no latents; run the stage 'latents' first")
    return np.concatenate(shards)
