"""DDIM inversion: take the init image back to noise under its prompt, then draw it anew with guidance."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from serve_app.engine.samplers.calls import ModelCall, Sampler, Source
from serve_app.engine.samplers.levels import Levels
from serve_app.engine.samplers.start import Draws, steps_to_run
from serve_app.engine.samplers.steps import build_scheduler
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import GenerationTask

_ITERATIONS = 4
"""Evaluations of each inversion step. One is what is usually done, and loses 8% of a Gaussian's spread on a round trip
of 20 steps; four lose 5e-5."""


def inversion(config: Mapping[str, Any], task: GenerationTask, source: Source, seed: int) -> Sampler:
    """Inversion down to the noise level that ``strength`` selects, without guidance, then DDIM with guidance.

    A DDIM step asks the model at its upper end, so that its exact inverse needs the answer for a latent not yet known:
    a fixed point. At guidance 1 the way back therefore ends where the way up began.

    Both ways ask at the same timesteps; ``ModelCall.index`` is the timestep's place on the way back, so that a control
    window covers the same noise levels in both. ``_ITERATIONS`` + 1 evaluations a step.

    The latent is float32 throughout: a fixed point in half precision is as far off as a step without iterations.

    Masked, the unmasked part is taken from the way up, level by level: what is kept is exact.
    """
    levels = Levels(config)
    upward, downward = _schedulers(config, task)
    timesteps = downward.timesteps[task.steps - steps_to_run(task) :]
    draws = Draws(source, seed)
    if source.image is None:
        raise AssertionError("sampler() refuses a task without an init image")
    image = draws.latent(source.image).float()
    extra = None
    if source.mask is not None and source.masked is not None:
        extra = torch.cat([source.mask, draws.latent(source.masked)], dim=1)

    evaluations = len(timesteps) * (_ITERATIONS + 1)
    done = (asked / evaluations for asked in range(evaluations))
    path = [image]
    """The latent on the way up, below each timestep; at the end the noise itself."""
    for index in reversed(range(len(timesteps))):
        timestep = timesteps[index]
        guess = path[-1]
        for _ in range(_ITERATIONS):
            seen = guess.to(source.dtype)
            prediction = yield ModelCall(
                seen, float(timestep), index, len(timesteps), extra, conditional_only=True, done=next(done)
            )
            epsilon = levels.epsilon(prediction.float(), guess, _sigma(levels, timestep))
            guess = upward.step(epsilon, int(timestep), path[-1], return_dict=False)[0]
        path.append(guess)

    latent = path.pop()
    for index, timestep in enumerate(timesteps):
        seen = latent.to(source.dtype)
        prediction = yield ModelCall(seen, float(timestep), index, len(timesteps), extra, done=next(done))
        latent = downward.step(prediction.float(), timestep, latent, return_dict=False)[0]
        kept = path.pop()
        if source.mask is not None and extra is None:
            latent = (1 - source.mask) * kept + source.mask * latent
    return latent.to(source.dtype)


def _schedulers(config: Mapping[str, Any], task: GenerationTask) -> tuple[Any, Any]:
    """The inverse scheduler and the one it inverts, on the same steps."""
    downward = DDIMScheduler.from_config(dict(config), **SCHEDULERS["DDIMScheduler"].options)
    downward.set_timesteps(task.steps, device="cpu")
    # epsilon, because what the model says is about the upper end of a step and the class would take it for the lower.
    upward = build_scheduler({**config, "prediction_type": "epsilon"}, task, task.seed)
    return upward, downward


def _sigma(levels: Levels, timestep: Tensor) -> Tensor:
    alpha_bar = levels.alpha_bar[timestep]
    return ((1 - alpha_bar) / alpha_bar).sqrt()
