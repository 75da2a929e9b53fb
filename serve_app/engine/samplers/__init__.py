"""Samplers: from noise to a finished latent, one picture at a time.

A sampler is a generator: it yields a ``ModelCall`` whenever it needs the model's prediction and is sent the guided
prediction for it. The engine answers calls of many samplers with one forward; a sampler knows nothing of batches,
guidance or ControlNets. diffusers' schedulers are stateful, so every sampler owns one.

The order of random draws, the mask blend and the start index follow diffusers 0.42 (``pipeline_controlnet*.py``,
``pipeline_stable_diffusion_inpaint.py``): a picture equals the one its pipeline would draw, where there is one.
"""

from collections.abc import Callable, Mapping
from typing import Any

from serve_app.engine.samplers.calls import ModelCall, Sampler, Source
from serve_app.engine.samplers.exploding import karras_ve, score_sde_ve
from serve_app.engine.samplers.inversion import inversion
from serve_app.engine.samplers.ipndm import ipndm
from serve_app.engine.samplers.steps import steps
from serve_app.errors import JobError
from serve_app.schedulers import SCHEDULERS, needs_image_problem, scheduler_problem
from serve_app.tasks import GenerationTask, Mode

__all__ = ["SAMPLERS", "ModelCall", "Sampler", "Source", "sampler"]

SAMPLERS: Mapping[str, Callable[[Mapping[str, Any], GenerationTask, Source, int], Sampler]] = {
    "steps": steps,
    "karras_ve": karras_ve,
    "score_sde_ve": score_sde_ve,
    "ipndm": ipndm,
    "inversion": inversion,
}
"""What ``SchedulerSpec.sampler`` names: (scheduler config of the base model, task, source, seed) -> sampler."""


def sampler(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """The sampler of one picture of ``task``.

    ``config`` is the base model's scheduler config. Nothing is drawn before the first ``next()``, which raises what
    the scheduler raises.

    Raises:
        JobError: the scheduler's name is not served, or it needs an init image.
    """
    problem = scheduler_problem(task.scheduler)
    if problem is None and (task.mode is Mode.TEXT or source.image is None):
        problem = needs_image_problem(task.scheduler)
    if problem is not None:
        raise JobError(problem)
    return SAMPLERS[SCHEDULERS[task.scheduler].sampler](config, task, source, seed)
