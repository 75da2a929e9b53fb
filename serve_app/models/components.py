"""The parts of a loaded model, as the engine uses them. Holds torch modules; knows nothing of files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True, slots=True)
class BaseComponents:
    """A base model: everything but ControlNets. Modules are in eval mode on ``device`` with ``dtype``."""

    id: str
    family: str
    hash: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler_config: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    size_bytes: int
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    """SDXL's second text encoder; other families have one."""
    zero_empty_negative: bool = False
    """An empty negative prompt means embeddings of zeros: diffusers' ``force_zeros_for_empty_prompt``."""

    @property
    def text_encoders(self) -> tuple[tuple[CLIPTokenizer, CLIPTextModel | CLIPTextModelWithProjection], ...]:
        """Each with its tokenizer: one, or SDXL's two."""
        first = (self.tokenizer, self.text_encoder)
        if self.tokenizer_2 is None or self.text_encoder_2 is None:
            return (first,)
        return first, (self.tokenizer_2, self.text_encoder_2)

    @property
    def max_clip_skip(self) -> int:
        """Layers of the text encoders that can be skipped; SDXL reads the layer before the last, so one less."""
        layers = [encoder.config.num_hidden_layers for _, encoder in self.text_encoders]
        return int(min(layers)) - (len(layers) - 1)

    @property
    def vae_scale(self) -> int:
        """Pixels per latent cell on each side; 8 for SD."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


@dataclass(frozen=True, slots=True)
class NetComponents:
    """One ControlNet."""

    id: str
    family: str
    hash: str
    net: ControlNetModel | ControlNetUnionModel
    size_bytes: int

    @property
    def union(self) -> bool:
        """Whether one net serves many control types, which it is told (ControlNet-Union)."""
        return isinstance(self.net, ControlNetUnionModel)

    @property
    def global_pool(self) -> bool:
        """Whether residuals are averaged over the picture (shuffle)."""
        return bool(self.net.config.global_pool_conditions)
