"""The loop of diffusers' pipelines: scale, predict, step. It drives every scheduler that follows their interface."""

import copy
import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers

from serve_app.engine.samplers.calls import ModelCall, Sampler, Source
from serve_app.engine.samplers.start import Draws, start, steps_to_run
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import GenerationTask

_SPELLING = {"dpmsolver+++": "dpmsolver++"}
"""``algorithm_type`` of the API -> of diffusers, where they differ."""

_OTHER_SIGMAS = frozenset({"use_exponential_sigmas", "use_beta_sigmas"})
"""What a base model's config may ask for, and diffusers refuses beside Karras sigmas."""


def build_scheduler(config: Mapping[str, Any], task: GenerationTask, seed: int) -> Any:
    """A fresh diffusers scheduler on the base model's scheduler ``config``, on the task's steps; what the task says
    takes the place of what the config says."""
    spec = SCHEDULERS[task.scheduler]
    scheduler = getattr(diffusers, spec.class_name)
    options = dict(spec.options)
    if spec.karras:
        options["use_karras_sigmas"] = task.use_karras_sigmas
        if task.use_karras_sigmas:
            config = {name: value for name, value in config.items() if name not in _OTHER_SIGMAS}
    if task.algorithm_type in spec.algorithm_types:
        options["algorithm_type"] = _SPELLING.get(task.algorithm_type, task.algorithm_type)
    if "noise_sampler_seed" in inspect.signature(scheduler).parameters:
        options["noise_sampler_seed"] = seed
    return copy.deepcopy(_prepared(spec.class_name, json.dumps([dict(config), options]), task.steps))


@lru_cache(maxsize=64)
def _prepared(class_name: str, settings: str, steps: int) -> Any:
    """A scheduler that nobody has stepped. Some take 0.15 s to find their timesteps, in which the batch would wait."""
    config, options = json.loads(settings)
    scheduler = getattr(diffusers, class_name).from_config(config, **options)
    # Timesteps stay on the CPU: schedulers look indices up by value, which would wait for the GPU at every step.
    scheduler.set_timesteps(steps, device="cpu")
    return scheduler


def steps(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """The sampler of the schedulers that diffusers' pipelines drive."""
    return (yield from drive(build_scheduler(config, task, seed), task, source, seed))


def drive(scheduler: Any, task: GenerationTask, source: Source, seed: int) -> Sampler:
    """Run a scheduler with diffusers' interface: scaling, step and noise as its pipelines use them.

    ``scheduler`` has its timesteps already, all of the task's steps; those that strength leaves out are skipped here.
    """
    begin = (task.steps - steps_to_run(task)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        # DDIM, DDPM and PNDM find their place by the timestep's value and have none. The others would look for it so,
        # too, and go astray where rounding made two timesteps equal (Karras sigmas on a base with zero terminal
        # signal).
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    draws = Draws(source, seed)
    first = start(
        task,
        source,
        draws,
        spread=scheduler.init_noise_sigma,
        noised=lambda image, noise: scheduler.add_noise(image, noise, timesteps[:1]),
    )
    latent, blend = first.latent, first.blend
    accepted = inspect.signature(scheduler.step).parameters
    options = {"eta": 0.0, "generator": draws.generator}
    options = {name: value for name, value in options.items() if name in accepted}

    for index, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latent, timestep)
        prediction = yield ModelCall(scaled, float(timestep), index, len(timesteps), first.extra)
        latent = scheduler.step(prediction, timestep, latent, **options, return_dict=False)[0]
        if blend is not None:
            kept = blend.image
            if index + 1 < len(timesteps):
                kept = scheduler.add_noise(kept, blend.noise, timesteps[index + 1 : index + 2])
            latent = blend.keep(kept, latent)
    return latent
