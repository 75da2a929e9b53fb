"""One forward: what it predicts for a picture depends on nobody else in it."""

from typing import Any

import pytest
import torch

from serve_app.engine.denoise import predict
from serve_app.tasks import ControlInput, GenerationTask, Mode
from support.seats import no_beat, seats
from support.tiny import Zoo, controls, task


@torch.inference_mode()
def test_at_a_fixed_width_a_picture_is_bit_equal_beside_any_neighbours(zoo: Zoo) -> None:
    subject = task(prompt="subject", controls=controls("canny", "depth", "shuffle"))
    crowd: list[dict[str, Any]] = [
        {"controls": controls("shuffle", "canny"), "seed": 3},
        {"guidance_scale": 1.0, "controls": controls("depth", "depth")},
        {"controls": controls("depth"), "guess_mode": True, "mode": Mode.IMAGE, "strength": 0.5},
        {"controls": (ControlInput(net="canny", control_type="canny", start=0.5),), "samples": 2},
    ]
    (alone,) = predict(seats(zoo, subject), no_beat, pad_to=12).guided
    for place in range(len(crowd)):
        others = [task(**changes) for changes in crowd[: place + 1]]
        before = seats(zoo, *others[place:])
        together = [*before, *seats(zoo, subject), *seats(zoo, *others[:place])]
        assert torch.equal(predict(together, no_beat, pad_to=12).guided[len(before)], alone)


@torch.inference_mode()
def test_at_a_fixed_width_an_sdxl_picture_is_bit_equal_beside_any_neighbours(zoo: Zoo) -> None:
    def asked(*types: str, net: str = "xl-union", **changes: Any) -> GenerationTask:
        wanted = tuple(ControlInput(net=net, control_type=name, scale=0.7) for name in types)
        return task(**{"model": "xl", "family": "sdxl", "controls": wanted, **changes})

    subject = asked("canny", "depth", prompt="subject")
    crowd = [
        asked("openpose", "depth", "canny"),
        asked("canny", net="xl-canny", guidance_scale=1.0),
        asked("canny", guess_mode=True),
    ]
    (alone,) = predict(seats(zoo, subject), no_beat, pad_to=8).guided
    for place in range(len(crowd) + 1):
        before = seats(zoo, *crowd[:place])
        together = [*before, *seats(zoo, subject), *seats(zoo, *crowd[place:])]
        assert torch.equal(predict(together, no_beat, pad_to=8).guided[len(before)], alone)


@torch.inference_mode()
def test_at_a_fixed_width_every_forward_has_that_many_rows(zoo: Zoo) -> None:
    rows: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *call: rows.append(len(call[2])))
        for module in (zoo.base.unet.conv_out, *(net.net.controlnet_mid_block for net in zoo.nets.values()))
    ]
    both = seats(zoo, task(controls=controls("canny")), task(controls=controls("depth"), guess_mode=True))
    padded = predict(both, no_beat, pad_to=7)
    plain = predict(both, no_beat)
    for hook in hooks:
        hook.remove()
    assert rows == [7, 7, 7, 2, 1, 4]
    assert padded.rows == plain.rows == 4
    for fixed, free in zip(padded.guided, plain.guided, strict=True):
        torch.testing.assert_close(fixed, free, rtol=1e-5, atol=1e-5)


def test_a_width_too_small_is_refused(zoo: Zoo) -> None:
    with pytest.raises(ValueError, match=r"4 rows.*3"):
        predict(seats(zoo, task(), task()), no_beat, pad_to=3)
