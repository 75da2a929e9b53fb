"""Random models of the SD shape as folders: SD's own 8 pixels a cell, unlike those of ``tiny``."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from serve_app.models.demo.tokenizer import build_text_encoder, build_tokenizer
from support.tiny import SCHEDULER_CONFIG

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_CHANNELS = (8, 16)


def build_base(folder: Path, *, cross_attention_dim: int = 16) -> Path:
    """Save a base model to ``folder`` and return it."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=_CHANNELS,
            down_block_types=_DOWN,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=1,
            norm_num_groups=1,
            cross_attention_dim=cross_attention_dim,
        )
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            sample_size=512,
        )
        text_encoder = build_text_encoder(tokenizer, cross_attention_dim, mlp_width=2 * cross_attention_dim, heads=2)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler.from_config(dict(SCHEDULER_CONFIG)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def build_net(folder: Path, *, cross_attention_dim: int = 16, seed: int = 1) -> Path:
    """Save a ControlNet for ``build_base`` of the same width and return its folder."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = ControlNetModel(
            block_out_channels=_CHANNELS,
            down_block_types=_DOWN,
            layers_per_block=1,
            attention_head_dim=1,
            norm_num_groups=1,
            cross_attention_dim=cross_attention_dim,
            conditioning_embedding_out_channels=(8, 8, 8, 8),
        )
        for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # or it would add nothing
            nn.init.normal_(zero.weight, std=0.1)
    net.save_pretrained(folder, safe_serialization=True)
    return folder
