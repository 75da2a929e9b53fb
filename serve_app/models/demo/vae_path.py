"""Where the autoencoder's training starts: seeded noise, and a linear path laid through it that carries colours.

The path carries each value v as a pair of channels (+v, -v), always the first ones of a layer. SiLU keeps such pairs
linear, for silu(v) - silu(-v) = v, and a group of pairs has mean zero, so GroupNorm only rescales it. What the rest of
the network computes is noise that depends on the picture, added where the path ends.
"""

from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

_LATENTS = 4
_PAIRS = 2 * _LATENTS
"""Channels of the path."""

_DAMPED = ("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight")
"""What a residual branch ends in; small, so that depth doesn't drown the input."""
_SCALING = 0.18215  # of SD's VAE: latents are multiplied by it
_ANCHOR = 4.0
"""The VAE's fourth pair holds this constant, so that GroupNorm divides every picture by nearly the same number."""
_RGB_TO_LATENT = 2.0
"""Latents (after scaling) per unit of RGB in -1..1: photos then have a standard deviation near 1, as SD's do."""


def fill(module: nn.Module, seed: int) -> None:
    """Give every parameter seeded values: the same bytes on every machine, unlike torch's own generators.

    Matrices and kernels are normal with variance 1 / fan-in, norms 1, biases 0.
    """
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim < 2:  # noqa: PLR2004  - vectors: norms and biases
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            fan_in = parameter.numel() // parameter.shape[0]
            gain = (0.3 if name.endswith(_DAMPED) else 1.0) / np.sqrt(fan_in)
            values = random.standard_normal(parameter.shape, dtype=np.float32) * np.float32(gain)
            parameter.copy_(torch.from_numpy(values))


@torch.no_grad()
def lay_vae_path(vae: AutoencoderKL) -> None:
    """Encode a picture as its colours, averaged over each cell; decode by smooth enlargement plus faint texture.

    Latent channels 0..2 are R, G, B; channel 3 is noise of the picture's texture.
    """
    for half in (vae.encoder, vae.decoder):
        for module in half.modules():
            _let_pass(module)
        _split(half.conv_in, 3)
        half.conv_in.bias[6:_PAIRS] = torch.tensor([_ANCHOR, -_ANCHOR])
    rms = _ANCHOR * np.sqrt(2 / vae.encoder.conv_norm_out.num_channels * vae.encoder.conv_norm_out.num_groups)
    per_latent = _RGB_TO_LATENT / _SCALING
    vae.encoder.conv_out.weight[:3] = 0
    _join(vae.encoder.conv_out, 3, gain=rms * per_latent)
    vae.decoder.conv_in.weight[:6].mul_(1 / per_latent)
    vae.decoder.conv_out.weight.mul_(0.1)
    _join(vae.decoder.conv_out, 3, gain=rms)
    _identity(vae.post_quant_conv)
    _identity(vae.quant_conv)
    vae.quant_conv.weight[_LATENTS:] = 0
    vae.quant_conv.bias[_LATENTS:] = -8.0  # log variance: the encoder is nearly certain


def _split(conv: nn.Conv2d, values: int) -> None:
    """Input channel i becomes the pair (2i, 2i + 1); the rest of the path is cleared."""
    conv.weight[: min(_PAIRS, conv.out_channels)] = 0
    for value in range(values):
        conv.weight[2 * value, value, 1, 1] = 1.0
        conv.weight[2 * value + 1, value, 1, 1] = -1.0


def _join(conv: nn.Conv2d, values: int, gain: float = 1.0) -> None:
    """Add pair i, after a SiLU, to output channel i."""
    for value in range(values):
        conv.weight[value, 2 * value, 1, 1] += gain
        conv.weight[value, 2 * value + 1, 1, 1] -= gain


def _let_pass(module: nn.Module) -> None:
    """Keep the path clear of what a block of the VAE would add to it, and carry it where the shape changes."""
    if isinstance(module, ResnetBlock2D):
        _keep_out(module.conv2)
        if module.conv_shortcut is not None:
            _pass_on(module.conv_shortcut)
    elif isinstance(module, Attention):
        _keep_out(cast("nn.Linear", module.to_out[0]))
    elif isinstance(module, Downsample2D):  # the VAE pads right and below, so cells start at tap 0
        _pass_on(module.conv, kernel=_AVERAGE_2X2.roll((-1, -1), (0, 1)))
    elif isinstance(module, Upsample2D):
        _pass_on(module.conv, kernel=_BINOMIAL)


def _keep_out(layer: nn.Conv2d | nn.Linear) -> None:
    layer.weight[:_PAIRS] = 0


def _pass_on(conv: nn.Conv2d, kernel: torch.Tensor | None = None) -> None:
    """Output channel i of the path is input channel i."""
    conv.weight[:_PAIRS] = 0
    for channel in range(_PAIRS):
        conv.weight[channel, channel] = 1.0 if kernel is None else kernel


def _identity(conv: nn.Conv2d) -> None:
    conv.weight.copy_(torch.eye(conv.out_channels, conv.in_channels)[:, :, None, None])


_AVERAGE_2X2 = torch.tensor([[0.0, 0, 0], [0, 0.25, 0.25], [0, 0.25, 0.25]])
_BINOMIAL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
