"""What a forward does not do twice: its time with and without each saving, side by side in one run.

    python benchmarks/savings.py --sizes 64 512 --repetitions 9

Every picture is guided and has one ControlNet, so a forward of P pictures has 2 P rows. "without" is the same forward
made to do the work that the saving leaves out, as diffusers' pipelines do:

- net outside its window: the net runs though it has no say
- map embedded once: the net's embedding of the control map, for every row
- text encoded once: both prompts through the text encoder
- one row unguided: two rows although the guidance scale is 1
- keys and values kept: projected from the text in every cross-attention
- one row until the text: both rows of a picture from the start
- all: ``ControlNetModel.forward`` and ``UNet2DConditionModel.forward`` on all rows

The model is random. On a CPU it is small and runs on one thread; with ``--device cuda`` it has SD 1.5's size.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from models import small_base, small_nets
from report import RESULTS, machine, write
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from serve_app.engine import conditions
from serve_app.engine.controlnet import embed_map
from serve_app.engine.denoise import predict
from serve_app.engine.encode import prepare
from serve_app.engine.prompts import PromptEncoder
from serve_app.engine.request import GenerationRequest, Seat
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.tasks import AttemptRef, ControlInput, GenerationTask

Run = Callable[[], object]


def models(device: str) -> tuple[BaseComponents, NetComponents]:
    """A base model and a ControlNet; of SD 1.5's size and in half precision on a GPU."""
    base, net = small_base(), small_nets("canny")["canny"]
    if device == "cpu":
        return base, net
    heads: Mapping[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
    text = CLIPTextConfig(vocab_size=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    with torch.device(device):
        parts = UNet2DConditionModel(**heads), ControlNetModel(**heads), CLIPTextModel(text), base.vae
    unet, controlnet, encoder, vae = (nn.Module.to(part, device=device, dtype=torch.float16).eval() for part in parts)
    large = replace(base, unet=unet, text_encoder=encoder, vae=vae, device=torch.device(device), dtype=torch.float16)
    return large, replace(net, net=controlnet)


def seats(base: BaseComponents, net: NetComponents, side: int, pictures: int, **changes: Any) -> list[Seat]:
    """``pictures`` requests before their first step."""
    prompts = PromptEncoder()
    joined = []
    for n in range(pictures):
        control = ControlInput(net=net.id, control_type="canny", start=changes.get("start", 0.0))
        task = GenerationTask(
            model=base.id,
            family=base.family,
            prompt=f"picture {n}",
            width=side,
            height=side,
            seed=n,
            scheduler="DDIMScheduler",
            steps=20,
            guidance_scale=changes.get("guidance_scale", 7.5),
            controls=(control,),
        )
        drawn = np.random.default_rng(n).integers(0, 256, (side, side, 3), np.uint8)
        request = GenerationRequest(AttemptRef(job_id=n, attempt=1), task, base, (net,), maps=(drawn,))
        joined.append(prepare(request, prompts, 0))
    return [
        Seat(running, picture, picture.call)
        for running in joined
        for picture in running.pictures
        if picture.call is not None
    ]


def pairs(base: BaseComponents, net: NetComponents, side: int, pictures: int) -> dict[str, tuple[Run, Run]]:
    """Saving -> (with it, without it)."""
    guided, rows = seats(base, net, side, pictures), 2 * pictures
    late, unguided = (seats(base, net, side, pictures, **change) for change in ({"start": 0.5}, {"guidance_scale": 1}))
    unkept, kept_bytes = seats(base, net, side, pictures), conditions.KEPT_BYTES
    conditions.KEPT_BYTES = 0
    for seat in unkept:
        for model in (base.unet, net.net):
            seat.running.conditions(model)
    conditions.KEPT_BYTES = kept_bytes

    def plain() -> object:
        return forward(guided)

    def embed_again() -> None:
        for seat in guided:
            for _ in range(2):
                embed_map(seat.running.request.maps[0], net)
        plain()

    def encode_again() -> None:
        prompts = PromptEncoder()
        for seat in guided:
            prompts.rows(seat.running.request)
        plain()

    return {
        "net outside its window": (lambda: forward(late), plain),
        "map embedded once": (plain, embed_again),
        "text encoded once": (plain, encode_again),
        "one row unguided": (lambda: forward(unguided), plain),
        "keys and values kept": (plain, lambda: forward(unkept)),
        "one row until the text": (plain, lambda: forward(guided, rows)),
        "all": (plain, lambda: with_diffusers(guided)),
    }


def forward(seated: Sequence[Seat], pad_to: int | None = None) -> object:
    return predict(seated, lambda: None, pad_to=pad_to)


def with_diffusers(seated: Sequence[Seat]) -> object:
    """What the pipelines call in one step, on all rows at once; without what they do once per call."""
    request = seated[0].running.request
    latents = torch.cat([seat.call.latent.expand(2, -1, -1, -1) for seat in seated])
    times = torch.tensor([seat.call.timestep for seat in seated for _ in range(2)], device=latents.device)
    text = torch.cat([seat.running.conditioning.text for seat in seated])
    drawn = np.stack([seat.running.request.maps[0] for seat in seated for _ in range(2)]).transpose(0, 3, 1, 2)
    maps = torch.from_numpy(drawn).to(latents) / 255
    down, middle = request.nets[0].net(latents, times, text, maps, return_dict=False)
    noise = request.base.unet(
        latents,
        times,
        text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
        return_dict=False,
    )[0]
    unconditional, conditional = noise[0::2], noise[1::2]
    return unconditional + request.task.guidance_scale * (conditional - unconditional)


@torch.inference_mode()
def measure(base: BaseComponents, net: NetComponents, side: int, pictures: int, repetitions: int) -> list[Any]:
    """One row per saving; with and without take turns, so that a slow minute hits both."""

    def milliseconds(run: Run) -> float:
        begin = time.perf_counter()
        run()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    rows = []
    for saving, both in pairs(base, net, side, pictures).items():
        for run in both:
            milliseconds(run)  # sets up kernels
        taken = [[milliseconds(run) for run in both] for _ in range(repetitions)]
        having, lacking = (statistics.median(column) for column in zip(*taken, strict=True))
        rows.append(
            {
                "side": side,
                "rows": 2 * pictures,
                "saving": saving,
                "with_ms": having,
                "without_ms": lacking,
                "saved": 1 - having / lacking,
                "taken_ms": taken,
            }
        )
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], help="sides of the pictures")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 8], help="guided pictures in a forward")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "savings.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    described = machine()
    base, net = models(options.device)
    print(f"{'side':>5}{'rows':>5}  {'saving':<25}{'with ms':>9}{'without':>9}{'saved':>7}")
    results = []
    for side in options.sizes:
        for pictures in options.pictures:
            for row in measure(base, net, side, pictures, options.repetitions):
                results.append(row)
                print(
                    f"{side:>5}{row['rows']:>5}  {row['saving']:<25}{row['with_ms']:>9.2f}{row['without_ms']:>9.2f}"
                    f"{row['saved']:>7.1%}",
                    flush=True,
                )
    settings = {"repetitions": options.repetitions, "device": options.device}
    write(options.output, settings, results, described)


if __name__ == "__main__":
    main(sys.argv[1:])
