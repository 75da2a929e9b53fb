"""A small random model of SD's shape, for benchmarks: four levels, 32 to 64 channels, eight pixels a latent cell."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from serve_app.models.components import BaseComponents, NetComponents

_LEVELS: Mapping[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}
_SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""SD's noise schedule."""


def small_base() -> BaseComponents:
    """The same weights in every run; float32 on the CPU."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    unet = UNet2DConditionModel(sample_size=64, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, **_LEVELS)
    return BaseComponents(
        id="small",
        family="sd15",
        hash="random",
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler_config=_SCHEDULER,
        device=torch.device("cpu"),
        dtype=torch.float32,
        size_bytes=0,
    )


def small_nets(*names: str) -> dict[str, NetComponents]:
    """ControlNets for ``small_base``; their output convolutions hold numbers, or their work could be skipped."""
    nets = {}
    for seed, name in enumerate(names, start=1):
        torch.manual_seed(seed)
        net = ControlNetModel(**_LEVELS)
        for module in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        nets[name] = NetComponents(name, "sd15", name, net.eval(), 0)
    return nets
