"""The middle stage: UNet, text encoder and a first ControlNet learn together to take noise out of captioned scenes.

As Stable Diffusion 1.5: the noise is predicted, prompts are dropped now and then for guidance. Different: steps of much
noise count for more (min-SNR); noise has a common offset per picture and channel, without which a network learns to
read the ground's colour off the last steps' noise instead of the prompt; and half of each batch is guided by line
drawings from the start, which costs little and lets the colours be learned before the shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from serve_app.models.demo.captions import caption
from serve_app.models.demo.control_maps import MAKERS, as_hint
from serve_app.models.demo.latents import load, scene_of
from serve_app.models.demo.networks import NOISE_SCHEDULE, make_net, make_text_encoder, make_unet
from serve_app.models.demo.scenes import Scene, render
from serve_app.models.demo.tokenizer import MAX_TOKENS, build_tokenizer

MIN_SNR = 5.0
"""Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy (2023), section 3.4."""
NOISE_OFFSET = 0.1
"""Standard deviation of what all cells of a channel have in common. Guttenberg, Diffusion with Offset Noise (2023)."""
DROPPED = 0.1
Batches = tuple[tuple[int, int], ...]
BATCHES: Batches = ((128, 16), (128, 16), (128, 16), (256, 6))
"""Side and number of pictures in a batch, by turns. What words mean is learned from small, cheap pictures."""
LAST_BATCHES: Batches = ((512, 2), (256, 6))
LINES = ("canny", "canny", "lineart", "scribble")
"""What the first ControlNet is shown, each as often as it is named."""


@dataclass(frozen=True, slots=True)
class Noised:
    """A batch of noisy latents and what is to be found in them."""

    latents: Tensor
    """(B, 4, h, w)."""
    noise: Tensor
    timesteps: Tensor
    """(B,) int64."""
    weights: Tensor
    """(B,)."""

    def loss(self, predicted: Tensor) -> Tensor:
        error = (predicted.float() - self.noise).pow(2).mean(dim=(1, 2, 3))
        return (self.weights * error).mean()


class NoiseSource:
    """Adds noise by Stable Diffusion's schedule."""

    def __init__(self) -> None:
        alphas = DDPMScheduler.from_config(dict(NOISE_SCHEDULE)).alphas_cumprod
        self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
        snr = alphas / (1 - alphas)
        self.weights = snr.clamp(max=MIN_SNR) / snr

    def add(self, latents: Tensor) -> Noised:
        """Timesteps are spread evenly over the batch, which makes its loss less a matter of luck."""
        count = len(latents)
        steps = len(self.signal)
        timesteps = ((torch.randperm(count) + torch.rand(count)) / count * steps).long().clamp(max=steps - 1)
        noise = torch.randn_like(latents) + NOISE_OFFSET * torch.randn(*latents.shape[:2], 1, 1)
        noisy = self.signal[timesteps, None, None, None] * latents + self.spread[timesteps, None, None, None] * noise
        return Noised(noisy, noise, timesteps, self.weights[timesteps])


class Prompts:
    """Captions of training scenes as tokens."""

    def __init__(self, tokenizer: CLIPTokenizer, dropped: float) -> None:
        self.tokenizer, self.dropped = tokenizer, dropped

    def tokens(self, scenes: Sequence[Scene], random: np.random.Generator) -> Tensor:
        """(B, 77) int64."""
        texts = ["" if random.random() < self.dropped else caption(scene, random) for scene in scenes]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens: Tensor = ids.input_ids
        return tokens


class Scenes:
    """Training scenes with their latents, a batch of one size at a time."""

    def __init__(self, folder: Path, batches: Sequence[tuple[int, int]]) -> None:
        self.batches = batches
        self.latents = {side: load(folder, side) for side in {side for side, _ in batches}}

    def draw(self, step: int, random: np.random.Generator) -> tuple[int, list[Scene], Tensor]:
        """Side, scenes and their latents (B, 4, side/8, side/8)."""
        side, count = self.batches[step % len(self.batches)]
        indices = random.choice(len(self.latents[side]), size=count, replace=False).tolist()
        latents = torch.from_numpy(self.latents[side][indices]).float()
        return side, [scene_of(side, index) for index in indices], latents


class DiffusionModel(nn.Module):
    """UNet and text encoder, and a ControlNet for lines from which those of every control type start."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.unet: UNet2DConditionModel = make_unet()
        self.text_encoder: CLIPTextModel = make_text_encoder(self.tokenizer)
        self.net: ControlNetModel = make_net(self.unet)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, 77) to (B, 77, 96)."""
        embedded: Tensor = self.text_encoder(tokens).last_hidden_state
        return embedded


def predict(unet: UNet2DConditionModel, net: ControlNetModel, noised: Noised, text: Tensor, hints: Tensor) -> Tensor:
    """The predicted noise (B, 4, h, w); ``hints`` (n, 3, H, W) guide the first n rows."""
    guided = len(hints)
    down, middle = net(noised.latents[:guided], noised.timesteps[:guided], text[:guided], hints, return_dict=False)
    spread = [torch.cat([each, each.new_zeros(len(text) - guided, *each.shape[1:])]) for each in (*down, middle)]
    predicted: Tensor = unet(
        noised.latents,
        noised.timesteps,
        text,
        down_block_additional_residuals=spread[:-1],
        mid_block_additional_residual=spread[-1],
    ).sample
    return predicted


class DiffusionStage:
    """``last``: the end of the training, on pictures of the sizes that are served."""

    def __init__(self, latents: Path, *, bf16: bool, last: bool = False) -> None:
        self.name, self.seed, batches = ("served-size", 22, LAST_BATCHES) if last else ("diffusion", 21, BATCHES)
        torch.manual_seed(self.seed)
        self.model = DiffusionModel()
        self.trained: nn.Module = self.model
        self.model.unet.set_attn_processor(
            AttnProcessor()
        )  # on a CPU, for small pictures, four times as fast backwards
        self.bf16 = bf16
        self.scenes, self.noise = Scenes(latents, batches), NoiseSource()
        self.prompts = Prompts(self.model.tokenizer, DROPPED)

    def loss(self, step: int, random: np.random.Generator) -> Tensor:
        side, scenes, latents = self.scenes.draw(step, random)
        noised = self.noise.add(latents)
        tokens = self.prompts.tokens(scenes, random)
        hints = torch.cat([self._hint(side, scene, random) for scene in scenes[: len(scenes) // 2]])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            predicted = predict(self.model.unet, self.model.net, noised, self.model.embed(tokens), hints)
        return noised.loss(predicted)

    def _hint(self, side: int, scene: Scene, random: np.random.Generator) -> Tensor:
        make = MAKERS[LINES[random.integers(len(LINES))]]
        return as_hint(make(scene, render(scene, side, side), random))
