"""What sharing forwards gains: sixteen unlike requests at once, one after another, and through diffusers' pipelines.

    python benchmarks/step_time.py --sizes 64 512 --repetitions 3 --json benchmarks/results/step_time.json

The model is random and small (SD's shape, four levels, 32 to 64 channels) and runs on one thread: the ratios say how
much of a step is overhead that batching saves, not how fast a real model is.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from serve_app.config import DenoiserConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.engine.samplers import build_scheduler
from serve_app.metrics import PrometheusMeter
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.schedulers import available_schedulers
from serve_app.tasks import AttemptRef, ControlInput, GenerationTask, Mode

REQUESTS = 16
LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}


def build_models() -> tuple[BaseComponents, dict[str, NetComponents]]:
    """A base model and two ControlNets; eight pixels a latent cell, as in SD."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer(model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    )
    base = BaseComponents(
        id="small",
        family="sd15",
        hash="random",
        unet=UNet2DConditionModel(
            sample_size=64, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, **LEVELS
        ).eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler_config={
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
        },
        device=torch.device("cpu"),
        dtype=torch.float32,
        size_bytes=0,
    )
    nets = {
        name: NetComponents(name, "sd15", name, ControlNetModel(**LEVELS).eval(), 0) for name in ("canny", "scribble")
    }
    return base, nets


def build_requests(
    base: BaseComponents, nets: dict[str, NetComponents], side: int, steps: int
) -> list[GenerationRequest]:
    """Sixteen that differ in scheduler, steps, guidance, mode, and in which and how many ControlNets they use."""
    rng = np.random.default_rng(0)
    names = available_schedulers()
    requests = []
    for n in range(REQUESTS):
        used = [(), ("canny",), ("scribble",), ("canny", "scribble")][n % 4]
        mode = Mode.IMAGE if n % 5 == 4 else Mode.TEXT
        task = GenerationTask(
            model=base.id,
            family=base.family,
            prompt=f"picture {n}",
            width=side,
            height=side,
            seed=n,
            scheduler=names[n % len(names)],
            steps=steps + n % 3,
            guidance_scale=1.0 if n % 8 == 7 else 7.5,
            strength=0.75 if mode is Mode.IMAGE else 1.0,
            mode=mode,
            controls=tuple(ControlInput(net=name, control_type=name, scale=0.5 + n / 32) for name in used),
        )
        maps = tuple(rng.integers(0, 256, (side, side, 3), np.uint8) for _ in used)
        image = rng.integers(0, 256, (side, side, 3), np.uint8) if mode is Mode.IMAGE else None
        ref = AttemptRef(job_id=n, attempt=1)
        requests.append(GenerationRequest(ref, task, base, tuple(nets[name] for name in used), image, None, maps))
    return requests


def in_engine(requests: Sequence[GenerationRequest]) -> float:
    """Run them together; the mean number of rows of a forward."""
    engine = Engine(DenoiserConfig(max_rows=2 * REQUESTS), PrometheusMeter())
    for request in requests:
        engine.add(request)
    while engine.busy:
        for ended in engine.step():
            if not isinstance(ended.outcome, RunningRequest):
                raise ended.outcome
    return engine.unet_rows / engine.unet_forwards


def at_once(requests: Sequence[GenerationRequest]) -> float:
    return in_engine(requests)


def one_by_one(requests: Sequence[GenerationRequest]) -> float:
    return statistics.mean(in_engine([request]) for request in requests)


def with_pipelines(requests: Sequence[GenerationRequest]) -> float:
    for request in requests:
        _pipeline(request)
    return statistics.mean(request.rows for request in requests)


def _pipeline(request: GenerationRequest) -> None:
    """The request as a user of diffusers would run it; parts are loaded already, building a pipeline is cheap."""
    task, base = request.task, request.base
    parts: dict[str, Any] = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": build_scheduler(base.scheduler_config, task),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    options: dict[str, Any] = {}
    maps = [Image.fromarray(drawn) for drawn in request.maps]
    name = "StableDiffusionControlNet" if maps else "StableDiffusion"
    if maps:
        parts["controlnet"] = [net.net for net in request.nets]
        options["control_image" if request.init_image is not None else "image"] = maps
        options["controlnet_conditioning_scale"] = [control.scale for control in task.controls]
    if request.init_image is not None:
        options |= {"image": Image.fromarray(request.init_image), "strength": task.strength}
        name += "Img2Img"
    else:
        options |= {"height": task.height, "width": task.width}
    pipeline = getattr(diffusers, f"{name}Pipeline")(**parts)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(task.seed)
    pipeline(
        task.prompt,
        num_inference_steps=task.steps,
        guidance_scale=task.guidance_scale,
        generator=generator,
        **options,
    )


WAYS: dict[str, Callable[[Sequence[GenerationRequest]], float]] = {
    "engine, at once": at_once,
    "engine, one by one": one_by_one,
    "diffusers, one by one": with_pipelines,
}


def measure(sizes: Sequence[int], steps: int, repetitions: int) -> list[dict[str, Any]]:
    """One row per size and way; ways alternate within a repetition, so that a slow minute hits all of them."""
    base, nets = build_models()
    rows = []
    for side in sizes:
        requests = build_requests(base, nets, side, steps)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        mean_rows = dict.fromkeys(WAYS, 0.0)
        at_once(requests[:4])  # first calls set up kernels and caches
        for _ in range(repetitions):
            for way, run in WAYS.items():
                begin = time.perf_counter()
                mean_rows[way] = run(requests)
                seconds[way].append(time.perf_counter() - begin)
        together = statistics.median(seconds["engine, at once"])
        rows += [
            {
                "pixels": f"{side}x{side}",
                "way": way,
                "seconds": taken,
                "median_s": statistics.median(taken),
                "mean_rows": mean_rows[way],
                "times_at_once": statistics.median(taken) / together,
            }
            for way, taken in seconds.items()
        ]
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512], help="sides of the pictures, pixels")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    rows = measure(options.sizes, options.steps, options.repetitions)
    print(f"{'pixels':<10}{'way':<24}{'median s':>9}{'rows':>7}{'x at once':>11}")
    for row in rows:
        print(
            f"{row['pixels']:<10}{row['way']:<24}{row['median_s']:>9.2f}{row['mean_rows']:>7.1f}"
            f"{row['times_at_once']:>11.2f}"
        )
    if options.json is not None:
        report = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
            "threads": torch.get_num_threads(),
            "requests": REQUESTS,
            "steps": options.steps,
            "repetitions": options.repetitions,
            "results": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
