"""Requests that benchmarks send: unlike on purpose, and the same in every run."""

import io
from base64 import b64encode
from collections.abc import Mapping

import numpy as np
from PIL import Image

SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)

CONTROLS = ("canny", "scribble", "lineart", "tile")


def drawing(size: int = 256) -> str:
    """Rings around an off-centre point, as base64 PNG: something with edges everywhere."""
    y, x = np.mgrid[0:size, 0:size]
    rings = (np.hypot(x - size * 0.4, y - size * 0.6) // (size / 12)) % 2 * 255
    buffer = io.BytesIO()
    Image.fromarray(rings.astype(np.uint8)).convert("RGB").save(buffer, "PNG")
    return b64encode(buffer.getvalue()).decode()


def unlike_requests(count: int, size: int, steps: int) -> list[Mapping[str, object]]:
    """``count`` bodies for ``POST controlnet`` that differ in prompt, scheduler, steps, ControlNet and guidance.

    ``steps`` is the mean number of steps; they vary by a quarter around it.
    """
    picture = drawing()
    return [
        {
            "model_id": "demo",
            "prompt": f"picture number {n}, with {n % 7} red circles",
            "controlnet_model": CONTROLS[n % len(CONTROLS)],
            "scheduler": SCHEDULERS[n % len(SCHEDULERS)],
            "num_inference_steps": min(50, steps - steps // 4 + (n * 3) % (steps // 2 + 1)),
            "guidance_scale": 4 + n % 5,
            "init_image": picture,
            "width": size,
            "height": size,
            "seed": n,
        }
        for n in range(count)
    ]
