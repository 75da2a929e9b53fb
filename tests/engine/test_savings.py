"""What a forward does not do twice: the work is really saved, and nothing changes by it."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from serve_app.engine.denoise import predict
from serve_app.tasks import ControlInput
from support.seats import no_beat, seats
from support.tiny import Zoo, controls, latents, request, run, task, tiny_engine

LATE = ControlInput(net="depth", control_type="depth", start=0.5)


@contextmanager
def rows_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """The rows of every call of ``modules``, in order."""
    rows: dict[str, list[int]] = {name: [] for name in modules}

    def count(name: str) -> Any:
        return lambda *call: rows[name].append(len(call[2]))

    hooks = [module.register_forward_hook(count(name)) for name, module in modules.items()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def text_projections(model: nn.Module) -> dict[str, nn.Module]:
    blocks = [block for block in model.modules() if isinstance(block, BasicTransformerBlock)]
    return {f"{n} {name}": getattr(block.attn2, name) for n, block in enumerate(blocks) for name in ("to_k", "to_v")}


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_keys_and_values_of_the_text_are_computed_once_per_request(zoo: Zoo) -> None:
    """Three requests of two, one and two rows, over all their steps."""
    wanted = [
        task(controls=(*controls("canny"), LATE), steps=6),
        task(guidance_scale=1.0, steps=3),
        task(samples=2, steps=4, guess_mode=True, controls=controls("canny")),
    ]
    models = {"unet": zoo.base.unet, "canny": zoo.nets["canny"].net, "depth": zoo.nets["depth"].net}
    watched = {f"{name} {key}": one for name, model in models.items() for key, one in text_projections(model).items()}
    with rows_of(watched) as rows:
        run(tiny_engine(), [(n, request(zoo, one)) for n, one in enumerate(wanted)])
    asked = {"unet": Counter([2, 1, 2]), "canny": Counter([2, 2]), "depth": Counter([2])}
    assert {name: Counter(calls) for name, calls in rows.items()} == {name: asked[name.split()[0]] for name in watched}


@torch.inference_mode()
def test_kept_keys_and_values_are_those_of_every_forward(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal alone, where the projections have the same rows; else the last bit depends on their number."""
    alone, crowd = task(controls=controls("canny")), task(guidance_scale=1.0, controls=controls("canny", "depth"))
    kept, among = predict(seats(zoo, alone), no_beat).guided, predict(seats(zoo, alone, crowd), no_beat).guided
    monkeypatch.setattr("serve_app.engine.conditions.KEPT_BYTES", 0)
    assert torch.equal(kept[0], predict(seats(zoo, alone), no_beat).guided[0])
    for mine, other in zip(among, predict(seats(zoo, alone, crowd), no_beat).guided, strict=True):
        same(mine, other)


@torch.inference_mode()
def test_keys_and_values_die_with_their_request(zoo: Zoo) -> None:
    (seat,) = seats(zoo, task(controls=controls("canny")))
    predict([seat], no_beat)
    models = (zoo.base.unet, zoo.nets["canny"].net)
    states = [weakref.ref(seat.running.conditions(model).states) for model in models]
    assert all(state() is not None for state in states)
    del seat
    gc.collect()
    assert [state() for state in states] == [None, None]


@torch.inference_mode()
def test_a_long_prompt_keeps_no_more_than_it_may(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    (width,) = {seat.running.conditions(zoo.base.unet).states.shape[-1] for seat in seats(zoo, task())}
    monkeypatch.setattr("serve_app.engine.conditions.KEPT_BYTES", 2 * 77 * width * 4)
    (short, long) = seats(zoo, task(prompt="a " * 100), task(prompt="a " * 200))
    assert short.running.conditions(zoo.base.unet).states.shape == (2, 2 * 77, width)
    assert not long.running.conditions(zoo.base.unet).places
    predict([long], no_beat)


def beginning(model: Any) -> dict[str, nn.Module]:
    """What precedes the text in SD 1.5, and the first that does not."""
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    return {
        "time": model.time_embedding,
        "conv_in": model.conv_in,
        "resnet": model.down_blocks[0].resnets[0],
        "self-attention": block.attn1.to_out[0],
        "query": block.attn2.to_q,
        "cross-attention": block.attn2.to_out[0],
        "end": model.conv_out if hasattr(model, "conv_out") else model.controlnet_mid_block,
    }


MIXED = (
    task(controls=controls("canny")),
    task(guidance_scale=1.0, controls=controls("canny")),
    task(controls=controls("canny"), guess_mode=True),
)
"""Five rows of three pictures; four of them in the net."""


@torch.inference_mode()
def test_the_rows_of_a_picture_are_one_until_the_text_enters(zoo: Zoo) -> None:
    for model, all_rows in ((zoo.base.unet, 5), (zoo.nets["canny"].net, 4)):
        mixed = seats(zoo, *MIXED)
        with rows_of(beginning(model)) as rows:
            shared = predict(mixed, no_beat).guided
        assert rows == {name: [3] for name in rows} | {"cross-attention": [all_rows], "end": [all_rows]}
        with rows_of(beginning(model)) as rows:
            apart = predict(mixed, no_beat, pad_to=5).guided
        assert rows == {name: [5] for name in rows}
        for mine, other in zip(shared, apart, strict=True):
            same(mine, other)


@torch.inference_mode()
def test_sdxl_shares_the_first_convolution(zoo: Zoo) -> None:
    """Its pooled text enters with the time embedding."""
    unet = zoo.families["xl"].unet
    mixed = seats(zoo, *(task(model="xl", family="sdxl", guidance_scale=scale) for scale in (5.0, 1.0)))
    watched = {"conv_in": unet.conv_in, "resnet": unet.down_blocks[0].resnets[0], "end": unet.conv_out}
    with rows_of(watched) as rows:
        shared = predict(mixed, no_beat).guided
    assert rows == {"conv_in": [2], "resnet": [3], "end": [3]}
    for mine, other in zip(shared, predict(mixed, no_beat, pad_to=3).guided, strict=True):
        same(mine, other)


@torch.inference_mode()
def test_sdxl_embeds_the_pooled_text_once_per_request(zoo: Zoo) -> None:
    xl, net = zoo.families["xl"].unet, zoo.nets["xl-canny"].net
    with rows_of({"unet": xl.add_embedding, "net": net.add_embedding}) as rows:
        (seat,) = seats(zoo, task(model="xl", family="sdxl", controls=controls("xl-canny")))
        for _ in range(3):
            predict([seat], no_beat)
    assert rows == {"unet": [2], "net": [2]}


@torch.inference_mode()
def test_a_call_for_the_conditional_row_alone_gets_it_unguided(zoo: Zoo) -> None:
    """Among guided pictures; the inversion of an image asks so."""
    plain, inverting = seats(zoo, *(task(prompt=prompt, controls=controls("canny")) for prompt in ("fox", "owl")))
    inverting = inverting._replace(call=replace(inverting.call, conditional_only=True))
    with rows_of({"unet": zoo.base.unet.conv_out, "net": zoo.nets["canny"].net.controlnet_mid_block}) as rows:
        _, ours = predict([plain, inverting], no_beat).guided
    assert rows == {"unet": [3], "net": [3]}
    unguided = task(prompt="owl", controls=controls("canny"), guidance_scale=1.0)
    same(ours, predict(seats(zoo, unguided), no_beat).guided[0])


@torch.inference_mode()
def test_a_mixed_batch_predicts_what_diffusers_predicts_for_each(zoo: Zoo) -> None:
    mixed = seats(zoo, *MIXED)
    net, unet = zoo.nets["canny"].net, zoo.base.unet
    for seat, ours in zip(mixed, predict(mixed, no_beat).guided, strict=True):
        asked, text = seat.running.request, seat.running.conditioning.text
        half = 1 if asked.task.guess_mode else asked.rows
        drawn = torch.from_numpy(asked.maps[0].transpose(2, 0, 1))[None] / 255
        down, middle = net(
            seat.call.latent.expand(half, -1, -1, -1),
            seat.call.timestep,
            text[-half:],
            drawn.expand(half, -1, -1, -1),
            0.8,
            guess_mode=asked.task.guess_mode,
            return_dict=False,
        )
        parts = [torch.cat([torch.zeros_like(part)] * (asked.rows - half) + [part]) for part in (*down, middle)]
        noise = unet(
            seat.call.latent.expand(asked.rows, -1, -1, -1),
            seat.call.timestep,
            text,
            down_block_additional_residuals=parts[:-1],
            mid_block_additional_residual=parts[-1],
            return_dict=False,
        )[0]
        same(ours, noise if asked.rows == 1 else noise[:1] + 6.0 * (noise[1:] - noise[:1]))


def test_a_map_is_embedded_once_per_request(zoo: Zoo) -> None:
    with rows_of({"canny": zoo.nets["canny"].net.controlnet_cond_embedding}) as rows:
        outcomes = run(tiny_engine(), [(0, request(zoo, one)) for one in MIXED])
    assert rows == {"canny": [1, 1, 1]}
    assert all(len(latents(outcome)) == 1 for outcome in outcomes.values())  # type: ignore[arg-type]
