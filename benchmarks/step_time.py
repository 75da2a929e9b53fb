"""What sharing forwards gains: sixteen unlike requests, at once in the engine, against two usual ways.

    python benchmarks/step_time.py --sizes 64 128 256 512 --repetitions 3

- "pipelines": a diffusers pipeline per request, one after another;
- "equal only": batches of requests that are equal in all but prompt and seed, one batch after another, as servers
  that hand whole batches to a pipeline do. Of the workload "unlike" no two are equal; of "half alike" eight are.

The model is random and small and runs on one thread: the ratios say how much of a step is overhead that sharing saves,
not how fast a real model is. "latents" leaves out the VAE's decoding, which no way shares.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from models import small_base, small_nets
from PIL import Image
from report import RESULTS, machine, write
from torch import Tensor

from serve_app.config import DenoiserConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.engine.samplers.steps import build_scheduler
from serve_app.metrics import PrometheusMeter
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.schedulers import available_schedulers
from serve_app.tasks import AttemptRef, ControlInput, GenerationTask, Mode

REQUESTS = 16
NO_PIPELINE = ("DDIMInverseScheduler", "IPNDMScheduler", "KarrasVeScheduler", "ScoreSdeVeScheduler")
"""Schedulers that fail or draw wrong pictures in diffusers' pipelines: there is nothing to compare with."""


class NoDecoder:
    """Stands for a VAE whose decoding costs nothing; everything else is the real one's."""

    def __init__(self, vae: Any) -> None:
        self.real = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def decode(self, latent: Tensor, **options: object) -> tuple[Tensor]:
        del options  # whatever the caller asks for
        rows, _, height, width = latent.shape
        return (latent.new_zeros(rows, 3, height * 8, width * 8),)


@dataclass(frozen=True)
class Taken:
    """One run of a workload in one way."""

    seconds: float
    forwards: int
    """Of the UNet."""


def build_task(n: int, side: int, steps: int) -> GenerationTask:
    """Unlike in scheduler, steps, guidance, mode, and in which and how many ControlNets are used."""
    names = [name for name in available_schedulers() if name not in NO_PIPELINE]
    used = [(), ("canny",), ("scribble",), ("canny", "scribble")][n % 4]
    mode = Mode.IMAGE if n % 5 == 4 else Mode.TEXT
    return GenerationTask(
        model="small",
        family="sd15",
        prompt=f"picture {n}",
        width=side,
        height=side,
        seed=n,
        scheduler=names[n % len(names)],
        steps=steps + n % 3,
        guidance_scale=1.0 if n % 8 == 7 else 7.5,
        strength=0.75 if mode is Mode.IMAGE else 1.0,
        use_karras_sigmas=False,
        mode=mode,
        controls=tuple(ControlInput(net=name, control_type=name, scale=0.5 + n / 32) for name in used),
    )


def build_requests(
    base: BaseComponents, nets: dict[str, NetComponents], side: int, steps: int, alike: int
) -> list[GenerationRequest]:
    """Sixteen; the first ``alike`` of them differ in prompt and seed only."""
    rng = np.random.default_rng(0)
    requests = []
    for n in range(REQUESTS):
        task = build_task(n, side, steps)
        if n < alike:
            task = build_task(1, side, steps).model_copy(update={"prompt": task.prompt, "seed": task.seed})
        maps = tuple(rng.integers(0, 256, (side, side, 3), np.uint8) for _ in task.controls)
        image = rng.integers(0, 256, (side, side, 3), np.uint8) if task.mode is Mode.IMAGE else None
        used = tuple(nets[control.net] for control in task.controls)
        requests.append(GenerationRequest(AttemptRef(job_id=n, attempt=1), task, base, used, image, None, maps))
    return requests


def at_once(requests: Sequence[GenerationRequest]) -> int:
    engine = Engine(DenoiserConfig(max_rows=2 * REQUESTS, max_running=REQUESTS), PrometheusMeter())
    for request in requests:
        engine.add(request)
    while engine.busy:
        for ended in engine.step():
            if not isinstance(ended.outcome, RunningRequest):
                raise ended.outcome
    return engine.unet_forwards


def equal_only(requests: Sequence[GenerationRequest]) -> int:
    batches: dict[str, list[GenerationRequest]] = defaultdict(list)
    for request in requests:
        settings = request.task.model_dump_json(exclude={"prompt", "negative_prompt", "seed"})
        batches[settings].append(request)
    return sum(at_once(batch) for batch in batches.values())


def pipelines(requests: Sequence[GenerationRequest]) -> int:
    forwards = []
    hook = requests[0].base.unet.register_forward_hook(lambda *_: forwards.append(1))
    for request in requests:
        _pipeline(request)
    hook.remove()
    return len(forwards)


def _pipeline(request: GenerationRequest) -> None:
    """The request as a user of diffusers would run it; parts are loaded already, building a pipeline is cheap."""
    task, base = request.task, request.base
    latents_only = isinstance(base.vae, NoDecoder)
    parts: dict[str, Any] = {
        "vae": base.vae.real if latents_only else base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": build_scheduler(base.scheduler_config, task, task.seed),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    options: dict[str, Any] = {"output_type": "latent" if latents_only else "np"}
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


WAYS: dict[str, Callable[[Sequence[GenerationRequest]], int]] = {
    "at once": at_once,
    "equal only": equal_only,
    "pipelines": pipelines,
}


def measure(side: int, steps: int, repetitions: int, alike: int, *, decode: bool) -> list[dict[str, Any]]:
    """One row per way; ways alternate within a repetition, so that a slow minute hits all of them."""
    base = small_base()
    if not decode:
        base = replace(base, vae=NoDecoder(base.vae))
    requests = build_requests(base, small_nets("canny", "scribble"), side, steps, alike)
    taken: dict[str, list[Taken]] = {way: [] for way in WAYS}
    for run in WAYS.values():
        run(requests[:2])  # first calls set up kernels and caches
    for _ in range(repetitions):
        for way, run in WAYS.items():
            begin = time.perf_counter()
            forwards = run(requests)
            taken[way].append(Taken(time.perf_counter() - begin, forwards))
    median = {way: statistics.median(one.seconds for one in runs) for way, runs in taken.items()}
    return [
        {
            "side": side,
            "workload": "half alike" if alike else "unlike",
            "what": "pictures" if decode else "latents",
            "way": way,
            "seconds": [round(one.seconds, 3) for one in runs],
            "forwards": runs[0].forwards,
            "times_at_once": round(median[way] / median["at once"], 2),
            "times_forwards": round(runs[0].forwards / taken["at once"][0].forwards, 2),
        }
        for way, runs in taken.items()
    ]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512], help="sides of the pictures")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_time.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    described = machine()
    rows = []
    print(f"{'side':>5} {'workload':<11}{'what':<9}{'way':<11}{'median s':>9}{'x':>7}{'forwards':>9}{'x':>7}")
    for side in options.sizes:
        for alike, decode in ((0, False), (REQUESTS // 2, False), (0, True)):
            for row in measure(side, options.steps, options.repetitions, alike, decode=decode):
                rows.append(row)
                print(
                    f"{side:>5} {row['workload']:<11}{row['what']:<9}{row['way']:<11}"
                    f"{statistics.median(row['seconds']):>9.2f}{row['times_at_once']:>7.2f}"
                    f"{row['forwards']:>9}{row['times_forwards']:>7.2f}",
                    flush=True,
                )
    settings = {"requests": REQUESTS, "steps": options.steps, "repetitions": options.repetitions}
    write(options.output, settings, rows, described)


if __name__ == "__main__":
    main(sys.argv[1:])
