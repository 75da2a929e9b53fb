"""One forward for one planned batch: ControlNets, UNet, guidance.

Rows of a batch belong to pictures of different requests; nothing here mixes them. A ControlNet runs on the rows that
want it and on no others; what it adds is scaled per row, outside the net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import ControlNetModel
from torch import Tensor

from serve_app.engine.request import Control, Seat


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one forward gave."""

    guided: tuple[Tensor, ...]
    """Per seat, (1, 4, h, w)."""
    rows: int
    """Rows of the UNet forward, padding not counted."""
    nets: tuple[str, ...]
    """Ids of the ControlNets, one per ControlNet forward."""


class _Rows(NamedTuple):
    """The rows of a batch, as the models take them."""

    latents: Tensor  # (R, 4, h, w)
    timesteps: Tensor  # (R,) float32: bit-equal to integer timesteps, and some schedulers use fractions
    text: Tensor  # (R, tokens, d)


class _Use(NamedTuple):
    """A ControlNet's part in one picture."""

    control: Control
    rows: range


def predict(seats: Sequence[Seat], beat: Callable[[], None], *, pad_to: int | None = None) -> Predictions:
    """The guided predictions for the calls of ``seats``, which must be of one group. At least one seat.

    ``beat`` is called after every ControlNet's forward, so that nobody takes a long step for a stuck one.

    With ``pad_to`` every forward, of the UNet and of each ControlNet, has exactly that many rows; copies of a row
    fill it up. Libraries pick their kernels by the shape of their input, and kernels differ in the last bit; at a
    fixed shape a row is bit-equal at every place and beside every neighbour.

    Raises:
        ValueError: ``pad_to`` is smaller than the number of rows.
    """
    base = seats[0].running.request.base
    spans = _spans(seats)
    times = [seat.call.timestep for seat, span in zip(seats, spans, strict=True) for _ in span]
    width = len(times) if pad_to is None else pad_to
    if width < len(times):
        raise ValueError(f"{len(times)} rows do not fit into a forward of {width}.")
    rows = _padded(
        _Rows(
            torch.cat(
                [seat.call.latent.expand(len(span), -1, -1, -1) for seat, span in zip(seats, spans, strict=True)]
            ),
            torch.tensor(times, dtype=torch.float32, device=base.device),
            torch.cat([seat.conditioning.text for seat in seats]),
        ),
        width,
    )
    residuals, nets = _control_residuals(rows, seats, spans, beat, pad_to)
    sample = rows.latents
    if seats[0].call.extra is not None:
        extras = [
            seat.call.extra.expand(len(span), -1, -1, -1)
            for seat, span in zip(seats, spans, strict=True)
            if seat.call.extra is not None
        ]
        sample = torch.cat([rows.latents, _filled(torch.cat(extras), width)], dim=1)
    noise = base.unet(
        sample,
        rows.timesteps,
        encoder_hidden_states=rows.text,
        down_block_additional_residuals=residuals[:-1] or None,
        mid_block_additional_residual=residuals[-1] if residuals else None,
        return_dict=False,
    )[0]
    guided = tuple(_guide(noise[span.start : span.stop], seat) for seat, span in zip(seats, spans, strict=True))
    return Predictions(guided, len(times), nets)


def _padded(rows: _Rows, width: int) -> _Rows:
    return _Rows(*(_filled(part, width) for part in rows))


def _filled(rows: Tensor, width: int) -> Tensor:
    """(r, ...) -> (width, ...), filled up with copies of the last row."""
    missing = width - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _spans(seats: Sequence[Seat]) -> list[range]:
    """The rows of every seat, side by side."""
    spans, begin = [], 0
    for seat in seats:
        spans.append(range(begin, begin + seat.rows))
        begin += seat.rows
    return spans


def _guide(noise: Tensor, seat: Seat) -> Tensor:
    """Classifier-free guidance: (2, 4, h, w) or, without it, (1, 4, h, w) -> (1, 4, h, w)."""
    if seat.rows == 1:
        return noise
    unconditional, conditional = noise.chunk(2)
    return unconditional + seat.running.request.task.guidance_scale * (conditional - unconditional)


def _control_residuals(
    rows: _Rows, seats: Sequence[Seat], spans: Sequence[range], beat: Callable[[], None], pad_to: int | None
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """What the ControlNets add to the UNet's skip connections, shallow to deep, the middle block last; and their ids.

    Each is (R, c, h, w), zero in rows that no net guides; empty where no net has a say in this step.
    """
    total: list[Tensor] = []
    uses = _uses(seats, spans)
    for group in uses:
        for level, part in enumerate(_one_net(rows, group, pad_to)):
            if level == len(total):
                total.append(part)
            else:
                # Not in place: a net that averages gives (R, c, 1, 1), which the sum widens.
                total[level] = total[level] + part
        beat()
    return tuple(total), tuple(group[0].control.net.id for group in uses)


def _uses(seats: Sequence[Seat], spans: Sequence[range]) -> list[list[_Use]]:
    """Every active ControlNet of the batch, grouped by net, in the order of the nets' names.

    That order is the same whoever shares the batch, so the last bit of a row's sum does not depend on its neighbours.
    A net that one request names twice makes two groups, so that no group adds to a row twice: on a GPU the order of
    such additions, and so the last bit of the sum, would be left to chance.
    """
    groups: dict[tuple[str, str, int], list[_Use]] = {}
    for seat, span in zip(seats, spans, strict=True):
        seen: dict[tuple[str, str], int] = {}
        for control in seat.running.controls:
            if not control.active(seat.call):
                continue
            net = (control.net.id, control.net.hash)
            seen[net] = seen.get(net, 0) + 1
            guided = span[-1:] if control.conditional_only else span
            groups.setdefault((*net, seen[net]), []).append(_Use(control, guided))
    return [groups[key] for key in sorted(groups)]


def _one_net(rows: _Rows, uses: Sequence[_Use], pad_to: int | None) -> list[Tensor]:
    """One ControlNet forward on the rows that want it; its scaled residuals spread over all R rows."""
    net = uses[0].control.net
    where = torch.tensor([row for use in uses for row in use.rows], device=rows.latents.device)
    hints = torch.cat([use.control.hint.expand(len(use.rows), -1, -1, -1) for use in uses])
    picked = _Rows(*(part.index_select(0, where) for part in rows))
    width = len(where) if pad_to is None else pad_to
    residuals = _residuals(net.net, _padded(picked, width), _filled(hints, width))
    if net.global_pool:
        residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
    scales = _scales(uses, len(residuals)).to(rows.latents)
    spread = []
    for level, residual in enumerate(residuals):
        everywhere = residual.new_zeros(len(rows.latents), *residual.shape[1:])
        scaled = residual[: len(where)] * scales[:, level, None, None, None]
        spread.append(everywhere.index_copy(0, where, scaled))
    return spread


def _scales(uses: Sequence[_Use], levels: int) -> Tensor:
    """(rows, levels): the factor of each residual in each row; guess mode weakens the shallow ones to a tenth."""
    fading = torch.logspace(-1, 0, levels)
    level_scales = [(fading if use.control.fading else torch.ones(levels)) * use.control.scale for use in uses]
    return torch.cat([scale.expand(len(use.rows), -1) for use, scale in zip(uses, level_scales, strict=True)])


def _residuals(net: ControlNetModel, rows: _Rows, hints: Tensor) -> list[Tensor]:
    """A ControlNet's forward from its embedded hints on, (r, c, h, w) per level, unscaled.

    ``ControlNetModel.forward`` embeds the control map anew at every step and in every row. The map does not change,
    so its embedding is computed once per request; the rest is that method for nets without class or size conditions.
    """
    embedded = net.time_embedding(net.time_proj(rows.timesteps).to(rows.latents.dtype))
    sample = net.conv_in(rows.latents) + hints
    skips = [sample]
    for block in net.down_blocks:
        if getattr(block, "has_cross_attention", False):
            sample, more = block(hidden_states=sample, temb=embedded, encoder_hidden_states=rows.text)
        else:
            sample, more = block(hidden_states=sample, temb=embedded)
        skips += more
    if getattr(net.mid_block, "has_cross_attention", False):
        sample = net.mid_block(sample, embedded, encoder_hidden_states=rows.text)
    else:
        sample = net.mid_block(sample, embedded)
    levels = [project(skip) for project, skip in zip(net.controlnet_down_blocks, skips, strict=True)]
    return [*levels, net.controlnet_mid_block(sample)]
