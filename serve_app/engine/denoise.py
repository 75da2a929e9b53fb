"""One forward for one planned batch: ControlNets, UNet, guidance.

Rows of a batch belong to pictures of different requests; nothing here mixes them. A ControlNet runs on the rows that
want it and on no others; what it adds is scaled per row, outside the net.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from serve_app.engine.controlnet import run_controlnet
from serve_app.engine.request import Control, Seat
from serve_app.engine.unet import Part, gather, run_unet


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one forward gave."""

    guided: tuple[Tensor, ...]
    """Per seat, (1, 4, h, w)."""
    rows: int
    """Rows of the UNet forward, padding not counted."""
    nets: tuple[str, ...]
    """Ids of the ControlNets, one per ControlNet forward."""


class _Use(NamedTuple):
    """A ControlNet's part in one picture."""

    control: Control
    seat: Seat
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
    spans = _spans(seats)
    count = spans[-1].stop
    if pad_to is not None and pad_to < count:
        raise ValueError(f"{count} rows do not fit into a forward of {pad_to}.")
    residuals, nets = _control_residuals(seats, spans, beat, pad_to)
    unet = seats[0].running.request.base.unet
    parts = [Part(_sample(seat), seat.call.timestep, seat.running.conditions(unet).last(seat.rows)) for seat in seats]
    noise = run_unet(unet, gather(parts, pad_to), residuals)
    guided = tuple(_guide(noise[span.start : span.stop], seat) for seat, span in zip(seats, spans, strict=True))
    return Predictions(guided, count, nets)


def _spans(seats: Sequence[Seat]) -> list[range]:
    """The rows of every seat, side by side."""
    spans, begin = [], 0
    for seat in seats:
        spans.append(range(begin, begin + seat.rows))
        begin += seat.rows
    return spans


def _sample(seat: Seat) -> Tensor:
    """(1, 4 or 9, h, w): what the UNet takes for a picture."""
    call = seat.call
    return call.latent if call.extra is None else torch.cat([call.latent, call.extra], dim=1)


def _guide(noise: Tensor, seat: Seat) -> Tensor:
    """Classifier-free guidance: (2, 4, h, w) or, without it, (1, 4, h, w) -> (1, 4, h, w)."""
    if seat.rows == 1:
        return noise
    unconditional, conditional = noise.chunk(2)
    return unconditional + seat.running.request.task.guidance_scale * (conditional - unconditional)


def _control_residuals(
    seats: Sequence[Seat], spans: Sequence[range], beat: Callable[[], None], pad_to: int | None
) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """What the ControlNets add to the UNet's skip connections, shallow to deep, the middle block last; and their ids.

    Each is (R, c, h, w), zero in rows that no net guides; empty where no net has a say in this step.
    """
    width = spans[-1].stop if pad_to is None else pad_to
    total: list[Tensor] = []
    uses = _uses(seats, spans)
    for group in uses:
        for level, part in enumerate(_one_net(group, width, pad_to)):
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
            groups.setdefault((*net, seen[net]), []).append(_Use(control, seat, guided))
    return [groups[key] for key in sorted(groups)]


def _one_net(uses: Sequence[_Use], width: int, pad_to: int | None) -> list[Tensor]:
    """One ControlNet forward on the rows that want it; its scaled residuals spread over ``width`` rows."""
    net = uses[0].control.net
    residuals = run_controlnet(net.net, gather([_part(use) for use in uses], pad_to))
    if net.global_pool:
        residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
    where = torch.tensor([row for use in uses for row in use.rows], device=residuals[0].device)
    scales = _scales(uses, len(residuals)).to(where.device)
    spread = []
    for level, residual in enumerate(residuals):
        everywhere = residual.new_zeros(width, *residual.shape[1:])
        # In float32: half precision would round the scale itself before it multiplies.
        scaled = residual[: len(where)] * scales[:, level, None, None, None]
        spread.append(everywhere.index_copy(0, where, scaled.to(residual.dtype)))
    return spread


def _part(use: _Use) -> Part:
    control, call = use.control, use.seat.call
    conditions = use.seat.running.conditions(control.net.net).last(len(use.rows))
    return Part(call.latent, call.timestep, conditions, control.hint(call), control.embedding)


def _scales(uses: Sequence[_Use], levels: int) -> Tensor:
    """(rows, levels): the factor of each residual in each row; guess mode weakens the shallow ones to a tenth."""
    fading = torch.logspace(-1, 0, levels)
    level_scales = [(fading if use.control.fading else torch.ones(levels)) * use.control.scale for use in uses]
    return torch.cat([scale.expand(len(use.rows), -1) for use, scale in zip(uses, level_scales, strict=True)])
