"""The VAE's side of a latent, against diffusers' formulas (``pipeline_stable_diffusion_xl_img2img.py``)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from serve_app.engine.decode import decode
from serve_app.engine.vae import decode_latent, encode_image
from serve_app.errors import JobError
from serve_app.models.components import BaseComponents
from support.tiny import tiny_base, tiny_sdxl

MEAN, STD = [0.1, -0.2, 0.3, -0.4], [1.5, 0.5, 2.0, 0.8]


def halved(base: BaseComponents) -> BaseComponents:
    torch.nn.Module.to(base.vae, dtype=torch.float16)
    return replace(base, dtype=torch.float16)


def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.inference_mode()
def test_sdxl_runs_its_vae_in_float32_where_half_precision_would_overflow() -> None:
    base = halved(tiny_sdxl())
    twin = halved(tiny_sdxl()).vae.float()
    sample = encode_image(base, pixels()).sample(torch.Generator().manual_seed(2))
    assert base.vae.dtype == torch.float32
    drawn = twin.encode(pixels()).latent_dist.sample(torch.Generator().manual_seed(2))
    assert torch.equal(sample, drawn.to(torch.float16))
    expected = twin.decode(sample.float() / twin.config.scaling_factor).sample
    assert torch.equal(decode_latent(base, sample), expected)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_who_does_not_ask_for_it_stays_in_half_precision(family: str) -> None:
    """The default says ``force_upcast``, and only diffusers' XL pipelines heed it; sdxl-vae-fp16-fix says no."""
    base = halved(tiny_base() if family == "sd15" else tiny_sdxl())
    if family == "sdxl":
        base.vae.register_to_config(force_upcast=False)
    assert encode_image(base, pixels()).mode().dtype == base.vae.dtype == torch.float16
    assert decode_latent(base, torch.zeros(1, 4, 16, 16)).dtype == base.vae.dtype == torch.float16


@torch.inference_mode()
def test_published_mean_and_deviation_are_taken_off_and_put_back() -> None:
    base, plain = tiny_sdxl(), tiny_sdxl()
    base.vae.register_to_config(latents_mean=MEAN, latents_std=STD)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (MEAN, STD))
    raw = plain.vae.encode(pixels()).latent_dist.sample(torch.Generator().manual_seed(2))
    shifted = encode_image(base, pixels()).sample(torch.Generator().manual_seed(2))
    torch.testing.assert_close(shifted, (raw - mean) / std)
    scale = base.vae.config.scaling_factor
    torch.testing.assert_close(decode_latent(base, shifted * scale), plain.vae.decode(raw).sample)


@torch.inference_mode()
def test_a_picture_of_nothing_is_an_error() -> None:
    base = tiny_base()
    assert decode(base, torch.zeros(1, 4, 16, 16)).dtype == np.uint8
    with pytest.raises(JobError, match="finite"):
        decode(base, torch.full((1, 4, 16, 16), torch.nan))
    base.vae.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(JobError, match="finite"):
        decode(base, torch.zeros(1, 4, 16, 16))
