"""Builds tiny models of the SD shape by code and saves them in diffusers layout.

``build_demo`` makes the demo model; ``build_tiny_base`` and ``build_tiny_net`` make one model of any family, smaller
still, for tests and benchmarks. The same arguments give the same bytes.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from serve_app.models.demo import (
    DEMO_CONTROL_TYPES,
    DEMO_ID,
    VERSION,
    VERSION_FILE,
    demo_folders,
    demo_net_id,
    is_complete,
)
from serve_app.models.demo.tokenizer import build_text_encoder, build_tokenizer
from serve_app.models.demo.weights import fill, lay_net_path, lay_unet_path, lay_vae_path

_EDGE_TYPES = ("canny", "scribble", "lineart")

DEMO_CHANNELS = (32, 64, 64, 64)
DEMO_WIDTH = 64
"""Width of the demo's text embeddings: SD1.5 has 768."""


def build_tiny_base(
    folder: Path,
    *,
    cross_attention_dim: int = 16,
    seed: int = 0,
    channels: Sequence[int] = (8, 16),
    vae_channels: Sequence[int] = (8, 8, 8, 8),
) -> Path:
    """Save a base model to ``folder`` and return it.

    ``channels``: of the UNet's blocks, multiples of 8, at least two; blocks but the last have cross-attention, and the
    first has none where there are three or more (on a CPU, attention over 64x64 cells would take most of the time).
    ``vae_channels``: four blocks make SD's 8 pixels per cell.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=()):  # constructors draw weights of their own, which are then replaced
        unet = _unet(channels, cross_attention_dim, seed)
        vae = _vae(vae_channels, seed + 1)
        text_encoder = build_text_encoder(tokenizer, cross_attention_dim, mlp_width=2 * cross_attention_dim, heads=2)
        fill(text_encoder, seed + 2)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_net(
    folder: Path,
    *,
    cross_attention_dim: int = 16,
    seed: int = 0,
    channels: Sequence[int] = (8, 16),
    hint_channels: Sequence[int] = (8, 8, 8, 8),
    global_pool: bool = False,
    edges: bool = False,
) -> Path:
    """Save a ControlNet for a base of the same ``cross_attention_dim`` and ``channels``, and return its folder.

    Unlike a fresh ControlNet, which ends in zeros, it does something. ``global_pool``: it sees only the average of
    its hint, as shuffle nets do; ``edges``: its hints are bright lines on black.
    """
    with torch.random.fork_rng(devices=()):
        net = ControlNetModel(
            block_out_channels=tuple(channels),
            down_block_types=_down_types(len(channels)),
            layers_per_block=1,
            attention_head_dim=1,
            norm_num_groups=channels[0] // 8,
            cross_attention_dim=cross_attention_dim,
            conditioning_embedding_out_channels=tuple(hint_channels),
            global_pool_conditions=global_pool,
        )
    fill(net, seed)
    lay_net_path(net, edges=edges)
    net.save_pretrained(folder, safe_serialization=True)
    return folder


def build_demo(folder: Path) -> dict[str, Path]:
    """Make the demo model under ``folder`` unless it is there in this version; catalogue id to folder, base first.

    Written under a temporary name and renamed, so that ``folder`` is never half there. Callers in several processes
    hold a lock around it.
    """
    if not is_complete(folder):
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _write_demo(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return demo_folders(folder)


def _write_demo(folder: Path) -> None:
    build_tiny_base(
        folder / DEMO_ID,
        cross_attention_dim=DEMO_WIDTH,
        seed=1005,
        channels=DEMO_CHANNELS,
        vae_channels=(16, 16, 16, 16),
    )
    for index, control_type in enumerate(DEMO_CONTROL_TYPES):
        build_tiny_net(
            folder / demo_net_id(control_type),
            cross_attention_dim=DEMO_WIDTH,
            seed=2000 + index,
            channels=DEMO_CHANNELS,
            hint_channels=(8, 8, 16, 16),
            global_pool=control_type == "shuffle",
            edges=control_type in _EDGE_TYPES,
        )
    (folder / VERSION_FILE).write_text(VERSION)


def _down_types(blocks: int) -> tuple[str, ...]:
    first = "CrossAttnDownBlock2D" if blocks == 2 else "DownBlock2D"  # noqa: PLR2004  - see build_tiny_base
    return (first, *["CrossAttnDownBlock2D"] * (blocks - 2), "DownBlock2D")


def _unet(channels: Sequence[int], cross_attention_dim: int, seed: int) -> UNet2DConditionModel:
    down = _down_types(len(channels))
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=tuple(channels),
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=1,
        attention_head_dim=1,
        norm_num_groups=channels[0] // 8,
        cross_attention_dim=cross_attention_dim,
    )
    fill(unet, seed)
    lay_unet_path(unet)
    return unet


def _vae(channels: Sequence[int], seed: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=channels[0] // 8,
        sample_size=512,
    )
    fill(vae, seed)
    lay_vae_path(vae)
    return vae
