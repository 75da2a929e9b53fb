"""ControlNets and ControlNet-Unions from their control maps to their residuals."""

from typing import Any

import numpy as np
import torch
from diffusers import ControlNetUnionModel
from torch import Tensor

from serve_app.engine.unet import Inputs, Stream
from serve_app.models.components import NetComponents
from serve_app.tasks import ControlMap


def embed_map(drawn: ControlMap, net: NetComponents) -> Tensor:
    """A control map (H, W, 3), through the net's own embedding: (1, c, h, w).

    uint8 maps become 0..1; float32 maps are taken as they are, for they may hold -1 (the inpaint net's 'masked').
    Union nets were trained with black there: https://github.com/xinsir6/ControlNetPlus, promax, inpainting.
    """
    values = drawn.astype(np.float32) / 255.0 if drawn.dtype == np.uint8 else drawn
    if net.union:
        values = values.clip(min=0)
    pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    if net.net.config.controlnet_conditioning_channel_order == "bgr":
        pixels = pixels.flip(1)
    return net.net.controlnet_cond_embedding(pixels.to(net.net.device, net.net.dtype))


def union_hint(net: ControlNetUnionModel, embedded: Tensor, index: int, scale: float) -> Tensor:
    """What a union net adds to its first feature map for one control of type ``index``: (1, c, h, w).

    ``embedded``: (1, c, h, w), the map after the net's embedding. The formulas of ``ControlNetUnionModel.forward``,
    which computes this at every step, from the map, its mean with the type's embedding, and the mean of the noisy
    latents, all through a transformer. That transformer's attention runs over the first dimension, which holds the
    rows of the batch and not the controls. The rows of one picture are equal there, so attention returns its values
    and the latents have no say: nothing of it changes from step to step. (diffusers lets the pictures of one call
    attend to each other; here every picture is alone, as in a call of its own.)
    """
    tokens = ((embedded.mean(dim=(2, 3)) + net.task_embedding[index]) * scale)[:, None]  # (1, 1, c)
    for layer in net.transformer_layes:
        tokens = layer(tokens)
    shift = net.spatial_ch_projs(tokens[:, 0])[..., None, None]
    return embedded * scale + shift * scale


def union_embedding(net: ControlNetUnionModel, indices: set[int]) -> Tensor:
    """(1, e): what a union net adds to the time embedding, for it is told which types of control it gets."""
    chosen = torch.zeros(1, net.config.num_control_type, device=net.device, dtype=net.dtype)
    chosen[0, sorted(indices)] = 1
    return net.control_add_embedding(net.control_type_proj(chosen.flatten()).reshape(1, -1).to(net.dtype))


def run_controlnet(net: Any, inputs: Inputs) -> list[Tensor]:
    """What the net adds to each skip connection, shallow to deep, the middle block last: (R, c, h, w), unscaled.

    ``inputs.hints`` are the embedded control maps: neither ``ControlNetModel.forward`` nor that of the union embeds
    them once for all steps.
    """
    stream = Stream.begin(net, inputs)
    skips = stream.down(net)
    stream.middle(net)
    levels = [project(skip) for project, skip in zip(net.controlnet_down_blocks, skips, strict=True)]
    return [*levels, net.controlnet_mid_block(stream.sample)]
