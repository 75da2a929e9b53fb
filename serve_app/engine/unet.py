"""A forward through the blocks of diffusers' UNets and ControlNets, with what need not be done twice done once.

The arithmetic is that of ``UNet2DConditionModel.forward``, ``CrossAttnDownBlock2D.forward`` and so on, down to the
transformer block; convolutions, norms and projections are the model's own modules. It is written out here because the
two rows of a guided picture are equal until the text first enters, and because the text's keys and values are known
beforehand. ``architecture.py`` says which configurations it covers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from serve_app.engine.conditions import Conditions, filled, joined


class Part(NamedTuple):
    """One picture's part in a forward."""

    latent: Tensor
    """(1, c, h, w)."""
    timestep: float
    conditions: Conditions
    """Of the rows that the picture takes."""
    hint: Tensor | None = None
    """(1, c', h, w): what a ControlNet adds to its first feature map."""
    embedding: Tensor | None = None
    """(1, e): what a ControlNet-Union adds to the time embedding."""


class Inputs(NamedTuple):
    """A forward's inputs. P pictures have R rows: P = R, or ``rows`` says which picture each row is of."""

    latents: Tensor  # (P, c, h, w)
    timesteps: Tensor  # (P,) float32: bit-equal to integer timesteps, and some schedulers use fractions
    hints: Tensor | None  # (P, c', h, w)
    embeddings: Tensor | None  # (P, e)
    conditions: Conditions  # R rows
    rows: Tensor | None  # (R,) int64


def gather(parts: Sequence[Part], pad_to: int | None) -> Inputs:
    """The inputs of one forward for ``parts``, the rows of each side by side.

    With ``pad_to`` there are that many rows, and every row goes all the way by itself: how many rows share their
    beginning depends on the neighbours' guidance.
    """
    pictures = [number for number, part in enumerate(parts) for _ in range(len(part.conditions))]
    width = len(pictures) if pad_to is None else pad_to
    device = parts[0].latent.device
    rows = None if width == len(parts) else filled(torch.tensor(pictures, device=device), width)
    latents = _joined([part.latent for part in parts])
    timesteps = torch.tensor([part.timestep for part in parts], dtype=torch.float32, device=device)
    hints, embeddings = _stacked([part.hint for part in parts]), _stacked([part.embedding for part in parts])
    if pad_to is not None and rows is not None:
        latents, timesteps = latents.index_select(0, rows), timesteps.index_select(0, rows)
        hints = None if hints is None else hints.index_select(0, rows)
        embeddings = None if embeddings is None else embeddings.index_select(0, rows)
        rows = None
    return Inputs(latents, timesteps, hints, embeddings, joined([part.conditions for part in parts], width), rows)


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Of one model: either all are there or none is."""
    there = [tensor for tensor in tensors if tensor is not None]
    return _joined(there) if there else None


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """In one memory layout, whatever they come in: a VAE's latents are laid out channels last, and ``cat`` would keep
    that beside others like them and lose it beside noise. Kernels of another layout differ in the last bit."""
    return torch.cat(list(tensors)).contiguous()


def run_unet(unet: Any, inputs: Inputs, residuals: Sequence[Tensor]) -> Tensor:
    """The UNet's prediction, (R, 4, h, w).

    ``residuals``: what ControlNets add, (R, c, h, w) per skip connection, shallow to deep, the middle block last; may
    be empty.
    """
    stream = Stream.begin(unet, inputs)
    skips = stream.down(unet)
    if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
    stream.middle(unet)
    if residuals:
        stream.sample = stream.sample + residuals[-1]
    stream.up(unet, skips)
    sample = stream.sample
    if unet.conv_norm_out is not None:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    prediction: Tensor = unet.conv_out(sample)
    return prediction


@dataclass(slots=True, eq=False)
class Stream:
    """Feature maps on their way through a model's blocks.

    They set out with one row per picture and part into the picture's rows where these first differ: at the added
    conditions of SDXL, else at the first cross-attention.
    """

    sample: Tensor
    """(P, c, h, w), after parting (R, c, h, w)."""
    time: Tensor
    """(P, e), after parting (R, e)."""
    conditions: Conditions
    rows: Tensor | None
    """(R,) the picture of each row; None where they have parted."""

    @classmethod
    def begin(cls, model: Any, inputs: Inputs) -> "Stream":
        """From latents to the first feature map, from timesteps to their embedding."""
        time = model.time_embedding(model.time_proj(inputs.timesteps).to(inputs.latents.dtype))
        if inputs.embeddings is not None:
            time = time + inputs.embeddings
        sample = model.conv_in(inputs.latents)
        if inputs.hints is not None:
            sample = sample + inputs.hints
        stream = cls(sample, time, inputs.conditions, inputs.rows)
        if inputs.conditions.added is not None:
            stream.part()
            stream.time = stream.time + inputs.conditions.added
        return stream

    def part(self) -> None:
        """From here on every row is its own."""
        if self.rows is not None:
            self.sample, self.time = self.sample.index_select(0, self.rows), self.time.index_select(0, self.rows)
            self.rows = None

    def down(self, model: Any) -> list[Tensor]:
        """The way down; what it leaves for the skip connections, (R, c, h, w) each, shallow to deep."""
        rows, skips = self.rows, [self.sample]
        shared = 0 if rows is None else 1
        for block in model.down_blocks:
            attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                self._layer(resnet, attention)
                skips.append(self.sample)
                shared += self.rows is not None
            for downsampler in block.downsamplers or ():
                self.sample = downsampler(self.sample)
                skips.append(self.sample)
                shared += self.rows is not None
        self.part()
        if rows is not None:
            skips[:shared] = [skip.index_select(0, rows) for skip in skips[:shared]]
        return skips

    def middle(self, model: Any) -> None:
        """The block at the bottom, where there is one."""
        block = model.mid_block
        if block is None:
            return
        self.sample = block.resnets[0](self.sample, self.time)
        for resnet, attention in zip(block.resnets[1:], block.attentions, strict=True):
            self._transform(attention)
            self.sample = resnet(self.sample, self.time)

    def up(self, unet: Any, skips: list[Tensor]) -> None:
        """The way up, which uses up ``skips``."""
        height, width = skips[0].shape[2:]
        even = height % 2**unet.num_upsamplers == 0 == width % 2**unet.num_upsamplers
        for block in unet.up_blocks:
            attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
            for resnet, attention in zip(block.resnets, attentions, strict=True):
                self.sample = torch.cat([self.sample, skips.pop()], dim=1)
                self._layer(resnet, attention)
            for upsampler in block.upsamplers or ():
                self.sample = upsampler(self.sample, None if even else skips[-1].shape[2:])

    def _layer(self, resnet: Any, attention: Any | None) -> None:
        self.sample = resnet(self.sample, self.time)
        if attention is not None:
            self._transform(attention)

    def _transform(self, transformer: Any) -> None:
        """diffusers' ``Transformer2DModel`` on feature maps, with blocks of self-attention, cross-attention, MLP."""
        states = _enter(transformer, self.sample)
        for block in transformer.transformer_blocks:
            normed = block.norm1(states)
            attention = block.attn1
            query, key, value = attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)
            states = _attend(attention, query, key, value) + states
            attention = block.attn2
            query = attention.to_q(block.norm2(states))
            if self.rows is not None:
                states, query = states.index_select(0, self.rows), query.index_select(0, self.rows)
                self.part()
            states = _attend(attention, query, *self.conditions.keys_values(attention)) + states
            states = block.ff(block.norm3(states)) + states
        self.sample = _leave(transformer, states, self.sample)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(R, n, inner) x (R, m, inner) x (R, m, inner) -> (R, n, c): diffusers' ``AttnProcessor2_0``."""
    query, key, value = (tensor.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    projected: Tensor = attention.to_out[0](mixed)
    return projected


def _enter(transformer: Any, sample: Tensor) -> Tensor:
    """(R, c, h, w) -> (R, h * w, inner)."""
    normed = transformer.norm(sample)
    if transformer.use_linear_projection:
        return transformer.proj_in(normed.flatten(2).transpose(1, 2))
    return transformer.proj_in(normed).flatten(2).transpose(1, 2)


def _leave(transformer: Any, states: Tensor, sample: Tensor) -> Tensor:
    """(R, h * w, inner) -> (R, c, h, w), added to what entered."""
    if transformer.use_linear_projection:
        states = transformer.proj_out(states)
    maps = states.transpose(1, 2).unflatten(2, sample.shape[2:]).contiguous()
    return (maps if transformer.use_linear_projection else transformer.proj_out(maps)) + sample
