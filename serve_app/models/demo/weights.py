"""Weights without training: seeded noise, and a linear path laid through it so that pictures mean something.

The path carries each value v as a pair of channels (+v, -v), always the first ones of a layer. SiLU keeps such pairs
linear, for silu(v) - silu(-v) = v, and a group of pairs has mean zero, so GroupNorm only rescales it. What the rest of
the network computes is noise that depends on prompt, timestep and picture, added where the path ends.
"""

from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

LATENTS = 4
PAIRS = 2 * LATENTS
"""Channels of the path."""

_DAMPED = ("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight")
"""What a residual branch ends in; small, so that depth doesn't drown the input."""
_SCALING = 0.18215  # of SD's VAE: latents are multiplied by it
_ANCHOR = 4.0
"""The VAE's fourth pair holds this constant, so that GroupNorm divides every picture by nearly the same number."""
_RGB_TO_LATENT = 2.0
"""Latents (after scaling) per unit of RGB in -1..1: photos then have a standard deviation near 1, as SD's do."""
_SMOOTH = 0.25
"""Share of the blurred input that the UNet takes for picture."""
_OPINION = 0.12
"""Share of everything off the path in the UNet's answer: prompt, timestep and random layers."""
_PULL = 0.4
"""How strongly a ControlNet at scale 1 draws each step towards its hint."""
_EDGE_GAIN = 4.0
"""An edge one pixel wide is an eighth of a cell; it is drawn this much stronger, on a background left alone."""


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
def lay_unet_path(unet: UNet2DConditionModel) -> None:
    """Predict noise = the input, normalised, less a share of its blur, + a little of everything else.

    The input itself is the right answer for data without structure, so latents keep their size under every sampler;
    what the blur leaves in grows into patches of colour. The path is the first skip connection: conv_in to the last
    resnet, which joins [hidden, skip].
    """
    _split(unet.conv_in, LATENTS)
    last = unet.up_blocks[-1].resnets[-1]
    _keep_out(last.conv2)
    _pass_on(last.conv_shortcut, start=last.conv_shortcut.in_channels - unet.conv_in.out_channels)
    unet.conv_out.weight.mul_(_OPINION)
    _join(unet.conv_out, LATENTS)
    for latent in range(LATENTS):
        unet.conv_out.weight[latent, 2 * latent] -= _SMOOTH * _BINOMIAL
        unet.conv_out.weight[latent, 2 * latent + 1] += _SMOOTH * _BINOMIAL


@torch.no_grad()
def lay_vae_path(vae: AutoencoderKL) -> None:
    """Encode a picture as its colours, averaged over each cell; decode by smooth enlargement plus faint texture.

    Latent channels 0..2 are R, G, B; channel 3 is noise of the picture's texture.
    """
    for half in (vae.encoder, vae.decoder):
        for module in half.modules():
            _let_pass(module)
        _split(half.conv_in, 3)
        half.conv_in.bias[6:PAIRS] = torch.tensor([_ANCHOR, -_ANCHOR])
    rms = _ANCHOR * np.sqrt(2 / vae.encoder.conv_norm_out.num_channels * vae.encoder.conv_norm_out.num_groups)
    per_latent = _RGB_TO_LATENT / _SCALING
    vae.encoder.conv_out.weight[:3] = 0
    _join(vae.encoder.conv_out, 3, gain=rms * per_latent)
    vae.decoder.conv_in.weight[:6].mul_(1 / per_latent)
    vae.decoder.conv_out.weight.mul_(0.1)
    _join(vae.decoder.conv_out, 3, gain=rms)
    _identity(vae.post_quant_conv)
    _identity(vae.quant_conv)
    vae.quant_conv.weight[LATENTS:] = 0
    vae.quant_conv.bias[LATENTS:] = -8.0  # log variance: the encoder is nearly certain


@torch.no_grad()
def lay_net_path(net: ControlNetModel, *, edges: bool) -> None:
    """Draw the predicted clean picture towards the hint, by the first residual, which meets the UNet's path.

    The noise prediction is lowered by pull x latent(hint), so the clean picture moves towards it. ``edges``: hints
    are bright lines on black, and the black means nothing.
    """
    embedding = net.controlnet_cond_embedding
    _split(embedding.conv_in, 3)
    for block in embedding.blocks:
        _relay(block, 3)
    for zero_convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        zero_convolution.weight.mul_(0.1)
    first, width = net.controlnet_down_blocks[0], net.conv_in.out_channels
    own = slice(width - 3, width)  # channels of conv_in that hold the hint and nothing else
    net.conv_in.weight[own] = 0
    embedding.conv_out.weight[own] = 0
    pull = _PULL * _RGB_TO_LATENT
    gain, offset = (_EDGE_GAIN, 0.0) if edges else (2.0, 1.0)  # a picture's hint is 0..1, its colours -1..1
    for colour in range(3):
        at = width - 3 + colour
        embedding.conv_out.weight[at, 2 * colour, 1, 1] = 1.0
        embedding.conv_out.weight[at, 2 * colour + 1, 1, 1] = -1.0
        for row, sign in ((2 * colour, -1.0), (2 * colour + 1, 1.0)):
            first.weight[row] = 0
            first.weight[row, at] = sign * pull * gain
            first.bias[row] = -sign * pull * offset


def _split(conv: nn.Conv2d, values: int) -> None:
    """Input channel i becomes the pair (2i, 2i + 1); the rest of the path is cleared."""
    conv.weight[: min(PAIRS, conv.out_channels)] = 0
    for value in range(values):
        conv.weight[2 * value, value, 1, 1] = 1.0
        conv.weight[2 * value + 1, value, 1, 1] = -1.0


def _join(conv: nn.Conv2d, values: int, gain: float = 1.0) -> None:
    """Add pair i, after a SiLU, to output channel i."""
    for value in range(values):
        conv.weight[value, 2 * value, 1, 1] += gain
        conv.weight[value, 2 * value + 1, 1, 1] -= gain


def _relay(conv: nn.Conv2d, values: int) -> None:
    """Pairs in, after a SiLU, pairs out; a stride of 2 averages 2x2 cells."""
    kernel = _AVERAGE_2X2 if conv.stride == (2, 2) else _CENTRE
    conv.weight[: 2 * values] = 0
    for value in range(values):
        for row, sign in ((2 * value, 1.0), (2 * value + 1, -1.0)):
            conv.weight[row, 2 * value] = sign * kernel
            conv.weight[row, 2 * value + 1] = -sign * kernel


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
    layer.weight[:PAIRS] = 0


def _pass_on(conv: nn.Conv2d, start: int = 0, kernel: torch.Tensor | None = None) -> None:
    """Output channel i of the path is input channel ``start + i``."""
    conv.weight[:PAIRS] = 0
    for channel in range(PAIRS):
        conv.weight[channel, start + channel] = 1.0 if kernel is None else kernel


def _identity(conv: nn.Conv2d) -> None:
    conv.weight.copy_(torch.eye(conv.out_channels, conv.in_channels)[:, :, None, None])


_CENTRE = torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])
_AVERAGE_2X2 = torch.tensor([[0.0, 0, 0], [0, 0.25, 0.25], [0, 0.25, 0.25]])
_BINOMIAL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
