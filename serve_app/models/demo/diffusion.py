"""The middle stage: UNet, text encoder and a first ControlNet learn together to take noise out of captioned scenes.

As Stable Diffusion: one noise schedule, prompts dropped now and then for guidance. What differs from 1.5, and why:

- The network predicts v, a mix of noise and picture, as in 2.1. Where there is much noise the prompt is all that says
  what the picture is, and an error of the picture hardly shows in an error of the noise: after 900 steps of predicting
  noise the prompt had no influence.
- Steps of little noise count for less (min-SNR).
- Noise has a common offset per picture and channel, or the ground's colour could be read off the noisiest steps.
- Half of each batch is guided by line drawings from the start: colours can be learned before shapes.
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
from serve_app.models.demo.networks import CELL, NOISE_SCHEDULE, make_net, make_text_encoder, make_unet
from serve_app.models.demo.scenes import Scene, render
from serve_app.models.demo.tokenizer import MAX_TOKENS, build_tokenizer

MIN_SNR = 5.0
"""Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy (2023), section 3.4; here the plain loss
of v where the ratio is below this."""
NOISE_OFFSET = 0.1
"""Standard deviation of what all cells of a channel have in common. Guttenberg, Diffusion with Offset Noise (2023)."""
ITEM_WEIGHT = 5.0
"""Items cover about a seventh of a picture; their colours were learned long after the ground's."""
DROPPED = 0.1
Batches = tuple[tuple[int, int], ...]
"""Side and number of pictures in a batch, by turns."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of the training of the base model."""

    name: str
    seed: int
    batches: Batches
    guided: float
    """Share of each batch that is guided by line drawings."""
    from_step: int = 0
    """Least timestep."""
    beta_end: float = NOISE_SCHEDULE["beta_end"]


_MILD = 0.012
"""Stable Diffusion's."""

PHASES: tuple[Phase, ...] = (
    Phase("words", 20, ((64, 64),), guided=0.0, from_step=600, beta_end=_MILD),
    Phase("diffusion", 21, ((128, 16), (128, 16), (128, 16), (256, 6)), guided=0.5, beta_end=_MILD),
    Phase("served-size", 22, ((512, 2), (256, 6)), guided=0.5, beta_end=_MILD),
    Phase("guided", 23, ((512, 2), (256, 6), (128, 12)), guided=0.9),
    Phase("large", 24, ((512, 3),), guided=0.9),
)
"""In order; each goes on from the one before. First what words mean, from many tiny pictures that are nearly noise,
where nothing but the prompt says what they are: without this phase the prompt had no influence after 900 steps. Last
the noise that the model is served with, and maps to follow; at the served size it takes
thousands of pictures until not only the lines are in their place but also what they enclose.
"""
LINES = ("canny", "canny", "lineart", "scribble")
"""What the first ControlNet is shown, each as often as it is named."""


@dataclass(frozen=True, slots=True)
class Noised:
    """A batch of noisy latents and what is to be found in them."""

    latents: Tensor
    """(B, 4, h, w)."""
    target: Tensor
    """(B, 4, h, w): v, see ``NoiseSource``."""
    timesteps: Tensor
    """(B,) int64."""
    weights: Tensor
    """(B,)."""

    def loss(self, predicted: Tensor, cells: Tensor) -> Tensor:
        """``cells`` (B, 1, h, w): how much each cell counts; a mean of 1 leaves the loss as large as it is."""
        error = (cells * (predicted.float() - self.target).pow(2)).mean(dim=(1, 2, 3))
        return (self.weights * error).mean()


class NoiseSource:
    """Adds noise as Stable Diffusion does, up to ``beta_end``: x = a latent + s noise, with a^2 + s^2 = 1.

    v = a noise - s latent (Salimans and Ho, Progressive Distillation, 2022, appendix D).
    """

    def __init__(self, beta_end: float = NOISE_SCHEDULE["beta_end"]) -> None:
        alphas = DDPMScheduler.from_config({**NOISE_SCHEDULE, "beta_end": beta_end}).alphas_cumprod
        self.signal, self.spread = alphas.sqrt(), (1 - alphas).sqrt()
        snr = alphas / (1 - alphas)
        self.weights = (snr.clamp(max=MIN_SNR) + 1) / (snr + 1)

    def add(self, latents: Tensor, from_step: int = 0) -> Noised:
        """Timesteps are spread over the batch, which makes its loss less a matter of luck, and the noisy ones denser:
        step t is drawn as often as t is great, for there the picture is decided.
        """
        count = len(latents)
        steps = len(self.signal)
        shares = (torch.randperm(count) + torch.rand(count)) / count
        timesteps = (from_step + shares.sqrt() * (steps - from_step)).long().clamp(max=steps - 1)
        noise = torch.randn_like(latents) + NOISE_OFFSET * torch.randn(*latents.shape[:2], 1, 1)
        signal, spread = (table[timesteps, None, None, None] for table in (self.signal, self.spread))
        return Noised(
            signal * latents + spread * noise, signal * noise - spread * latents, timesteps, self.weights[timesteps]
        )


class Prompts:
    """Captions of training scenes as tokens."""

    def __init__(self, tokenizer: CLIPTokenizer, dropped: float) -> None:
        self.tokenizer, self.dropped = tokenizer, dropped

    def tokens(self, scenes: Sequence[Scene], random: np.random.Generator) -> Tensor:
        """(B, 77) int64, or every other time no longer than the longest text.

        Among 77 tokens, most of them padding, a word has hardly any weight until attention has learned to look for it.
        """
        texts = ["" if random.random() < self.dropped else caption(scene, random) for scene in scenes]
        padding = "longest" if random.random() < 0.5 else "max_length"  # noqa: PLR2004  - a coin
        ids = self.tokenizer(texts, padding=padding, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens: Tensor = ids.input_ids
        return tokens


@dataclass(frozen=True, slots=True)
class Batch:
    side: int
    scenes: list[Scene]
    latents: Tensor
    """(B, 4, side/8, side/8)."""

    @property
    def cells(self) -> Tensor:
        """(B, 1, side/8, side/8), of mean 1: cells of items count ``ITEM_WEIGHT`` times as much as the ground's."""
        size = self.side // CELL
        shown = np.stack([render(scene, size, size).owner > 0 for scene in self.scenes])
        weights = torch.from_numpy(np.where(shown, ITEM_WEIGHT, 1.0)).float()[:, None]
        return weights / weights.mean()


class Scenes:
    """Training scenes with their latents, a batch of one size at a time."""

    def __init__(self, folder: Path, batches: Sequence[tuple[int, int]]) -> None:
        self.batches = batches
        self.latents = {side: load(folder, side) for side in {side for side, _ in batches}}

    def draw(self, step: int, random: np.random.Generator) -> Batch:
        side, count = self.batches[step % len(self.batches)]
        indices = random.choice(len(self.latents[side]), size=count, replace=False).tolist()
        latents = torch.from_numpy(self.latents[side][indices]).float()
        return Batch(side, [scene_of(side, index) for index in indices], latents)


class DiffusionModel(nn.Module):
    """UNet and text encoder, and a ControlNet for lines from which those of every control type start."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.unet: UNet2DConditionModel = make_unet()
        self.text_encoder: CLIPTextModel = make_text_encoder(self.tokenizer)
        self.net: ControlNetModel = make_net(self.unet)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, tokens) to (B, tokens, 96)."""
        embedded: Tensor = self.text_encoder(tokens).last_hidden_state
        return embedded


def predict(unet: UNet2DConditionModel, net: ControlNetModel, noised: Noised, text: Tensor, hints: Tensor) -> Tensor:
    """The predicted v (B, 4, h, w); ``hints`` (n, 3, H, W) guide the first n rows."""
    guided = len(hints)
    if not guided:
        return unet(noised.latents, noised.timesteps, text).sample
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
    """One phase of the base model's training."""

    def __init__(self, phase: Phase, latents: Path, *, bf16: bool) -> None:
        self.name, self.seed, self.phase = phase.name, phase.seed, phase
        torch.manual_seed(self.seed)
        self.model = DiffusionModel()
        self.trained: nn.Module = self.model
        self.model.unet.set_attn_processor(
            AttnProcessor()
        )  # on a CPU, for small pictures, four times as fast backwards
        self.bf16 = bf16
        self.scenes, self.noise = Scenes(latents, phase.batches), NoiseSource(phase.beta_end)
        self.prompts = Prompts(self.model.tokenizer, DROPPED)

    def loss(self, step: int, random: np.random.Generator) -> Tensor:
        batch = self.scenes.draw(step, random)
        noised = self.noise.add(batch.latents, self.phase.from_step)
        tokens = self.prompts.tokens(batch.scenes, random)
        guided = round(self.phase.guided * len(batch.scenes))
        hints = [self._hint(batch.side, scene, random) for scene in batch.scenes[:guided]]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            text = self.model.embed(tokens)
            predicted = predict(
                self.model.unet, self.model.net, noised, text, torch.cat(hints) if hints else tokens[:0]
            )
        return noised.loss(predicted, batch.cells)

    def _hint(self, side: int, scene: Scene, random: np.random.Generator) -> Tensor:
        make = MAKERS[LINES[random.integers(len(LINES))]]
        return as_hint(make(scene, render(scene, side, side), random))
