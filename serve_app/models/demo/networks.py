"""The demo model's networks, untrained: Stable Diffusion 1.5 in miniature, by diffusers' and transformers' classes.

Small enough that a picture of 512x512 takes seconds on two CPU cores: attention only where the picture is 16 or 8 cells
wide, and ControlNets without any, for a control map says where without being told what.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from serve_app.models.demo.tokenizer import build_text_encoder
from serve_app.models.demo.vae_path import fill, lay_vae_path

LATENT_CHANNELS = 4
CELL = 8
"""Pixels a latent cell is wide."""
TEXT_WIDTH = 96
CHANNELS = (32, 64, 96, 128)
HINT_CHANNELS = (16, 16, 32, 32)
VAE_CHANNELS = (16, 16, 32, 64)

NOISE_SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.022,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
}
"""Stable Diffusion 1.5's scheduler_config.json, but for two values.

The prediction is that of 2.1: see ``diffusion``. And 1.5 ends at a ``beta_end`` of 0.012, where 7% of the picture are
left at the last timestep. At 512x512 a figure covers so many cells that it shows through: a model trained so reads
figures into the noise it starts from, whatever the control map says. Here 1% are left.
"""


def make_vae(seed: int) -> AutoencoderKL:
    """Starts from the path that ``vae_path`` lays through noise: colours are right from the first step.

    Without it training spends its first thousand steps on them: the loss after 200 steps was 0.42, with it 0.16.
    """
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # the path needs groups of eight channels at least
        sample_size=512,
    )
    fill(vae, seed)
    lay_vae_path(vae)
    return vae


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,  # of SD1.5's UNet this is the number of heads
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
    )


def make_net(unet: UNet2DConditionModel, *, global_pool: bool = False) -> ControlNetModel:
    """A ControlNet that starts from the UNet's own way down, and from zero in what it adds to it."""
    net = ControlNetModel(
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D",) * len(CHANNELS),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        conditioning_embedding_out_channels=HINT_CHANNELS,
        global_pool_conditions=global_pool,
    )
    for own, source in (
        (net.conv_in, unet.conv_in),
        (net.time_embedding, unet.time_embedding),
        (net.down_blocks, unet.down_blocks),
        (net.mid_block, unet.mid_block),
    ):
        _start_from(own, source)
    return net


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """With words that differ from the start.

    transformers draws their embeddings so small that what its layers add to all of them alike drowns them: after 900
    steps the output was the same for every prompt, within a hundredth, and the UNet had learned to look past it.
    """
    encoder = build_text_encoder(tokenizer, TEXT_WIDTH, mlp_width=4 * TEXT_WIDTH, heads=4)
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.2)
    return encoder


def _start_from(own: nn.Module, source: nn.Module) -> None:
    """Copy the parameters that both have; attention is the UNet's alone."""
    given = source.state_dict()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(given[name])
