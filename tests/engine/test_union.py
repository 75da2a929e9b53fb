"""ControlNet-Union: the controls of a request that name one union net are one forward, as diffusers computes it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from serve_app.engine.denoise import predict
from serve_app.engine.request import Seat, union_index
from serve_app.errors import JobError
from serve_app.tasks import ControlInput, GenerationTask
from support.seats import no_beat, seats
from support.tiny import Zoo, request, task

CANNY, DEPTH, POSE, LINES = (
    ControlInput(net="xl-union", control_type=name, scale=scale)
    for name, scale in (("canny", 0.7), ("depth", 1.2), ("openpose", 0.4), ("mlsd", 0.9))
)


def changed(control: ControlInput, **changes: Any) -> ControlInput:
    return control.model_copy(update=changes)


def asked(*controls: ControlInput, **changes: Any) -> GenerationTask:
    return task(**{"model": "xl", "family": "sdxl", "controls": controls, **changes})


def pixels(seat: Seat, place: int) -> Tensor:
    """(1, 3, H, W) in 0..1."""
    return torch.from_numpy(seat.running.request.maps[place].transpose(2, 0, 1))[None] / 255


def reference(seat: Seat) -> Tensor:
    """The guided prediction through ``ControlNetUnionModel.forward`` and the UNet's, as the pipeline calls them."""
    wanted, call, said = seat.running.request.task, seat.call, seat.running.conditioning
    assert said.pooled is not None
    assert said.sizes is not None
    rows = seat.running.request.rows
    residuals: list[Tensor] = []
    for net in {one.id: one for one in seat.running.request.nets}.values():
        mine = [n for n, control in enumerate(wanted.controls) if control.net == net.id]
        kept = [
            control.start <= call.index / call.of and (call.index + 1) / call.of <= control.end
            for control in wanted.controls
        ]
        if not any(kept[n] and wanted.controls[n].scale for n in mine):
            continue
        indices = [union_index(net, wanted.controls[n].control_type) for n in mine]
        types = torch.zeros(1, net.net.config.num_control_type)
        types[0, indices] = 1
        half = 1 if wanted.guess_mode else rows
        down, middle = net.net(
            call.latent.expand(half, -1, -1, -1),
            call.timestep,
            encoder_hidden_states=said.text[-half:],
            controlnet_cond=[pixels(seat, n).expand(half, -1, -1, -1) for n in mine],
            control_type=types.expand(half, -1),
            control_type_idx=indices,
            conditioning_scale=[wanted.controls[n].scale * kept[n] for n in mine],
            guess_mode=wanted.guess_mode,
            added_cond_kwargs={"text_embeds": said.pooled[-half:], "time_ids": said.sizes[-half:]},
            return_dict=False,
        )
        parts = [torch.cat([torch.zeros_like(part)] * (rows - half) + [part]) for part in (*down, middle)]
        residuals = [a + b for a, b in zip(residuals, parts, strict=True)] if residuals else parts
    noise: Tensor = seat.running.request.base.unet(
        call.latent.expand(rows, -1, -1, -1),
        call.timestep,
        encoder_hidden_states=said.text,
        added_cond_kwargs={"text_embeds": said.pooled, "time_ids": said.sizes},
        down_block_additional_residuals=residuals[:-1] or None,
        mid_block_additional_residual=residuals[-1] if residuals else None,
        return_dict=False,
    )[0]
    if rows == 1:
        return noise
    unconditional, conditional = noise.chunk(2)
    return unconditional + wanted.guidance_scale * (conditional - unconditional)


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


UNLIKE = {
    "one control": asked(CANNY),
    "two": asked(CANNY, DEPTH),
    "three, one of a later window": asked(POSE, changed(DEPTH, start=0.5), CANNY),
    "two of one type": asked(CANNY, LINES),
    "one of two at scale zero": asked(changed(CANNY, scale=0.0), POSE),
    "unguided": asked(DEPTH, POSE, guidance_scale=1.0),
    "guess mode, one control": asked(CANNY, guess_mode=True),
    "guess mode, two": asked(CANNY, DEPTH, guess_mode=True),
    "two union nets": asked(CANNY, changed(DEPTH, net="xl-promax"), changed(POSE, net="xl-promax")),
    "all later": asked(changed(CANNY, start=0.5), changed(DEPTH, start=0.5)),
    "no control": asked(),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", UNLIKE)
def test_controls_of_one_net_are_one_forward(zoo: Zoo, name: str) -> None:
    alone = seats(zoo, UNLIKE[name])
    same(predict(alone, no_beat).guided, [reference(seat) for seat in alone])


@torch.inference_mode()
@pytest.mark.parametrize("pad_to", [None, 24], ids=str)
def test_requests_with_unlike_controls_share_a_forward(zoo: Zoo, pad_to: int | None) -> None:
    """diffusers' union net lets the rows of a batch attend to each other; here no request sees another."""
    together = seats(zoo, *UNLIKE.values())
    predicted = predict(together, no_beat, pad_to=pad_to)
    same(predicted.guided, [reference(seat) for seat in together])
    assert predicted.nets == ("xl-promax", "xl-union")


@torch.inference_mode()
def test_pictures_of_one_request_do_not_see_each_other(zoo: Zoo) -> None:
    several = predict(seats(zoo, asked(CANNY, DEPTH, samples=3)), no_beat).guided
    single = [predict(seats(zoo, asked(CANNY, DEPTH, seed=7 + n)), no_beat).guided[0] for n in range(3)]
    same(several, single)


def test_hints_are_embedded_once_per_request(zoo: Zoo) -> None:
    net, calls = zoo.nets["xl-union"].net, []
    watched = (net.controlnet_cond_embedding, net.transformer_layes[0], net.control_add_embedding)
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in watched]
    with torch.inference_mode():
        (seat,) = seats(zoo, asked(CANNY, DEPTH))
        before = len(calls)
        for _ in range(3):
            predict([seat], no_beat)
    for hook in hooks:
        hook.remove()
    assert before == len(calls) == 2 + 2 + 1


def test_a_type_that_the_net_does_not_know_is_refused_with_those_it_knows(zoo: Zoo) -> None:
    with pytest.raises(JobError, match=r"'xl-union'.*'shuffle'.*canny, depth"):
        request(zoo, asked(changed(CANNY, control_type="shuffle")))
    with pytest.raises(JobError, match=r"'xl-union'.*'tile'"):
        request(zoo, asked(changed(CANNY, control_type="tile")))
    request(zoo, asked(changed(CANNY, control_type="tile", net="xl-promax")))
