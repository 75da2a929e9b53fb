"""Random crowds: unlike requests that join a running batch at any step, and some that are cancelled."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from hypothesis import strategies as st

from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.errors import ServeError
from serve_app.schedulers import SCHEDULERS, available_schedulers
from serve_app.tasks import GenerationTask, Mode
from support.tiny import controls, latents, task

Outcome = RunningRequest | ServeError

tasks = st.builds(
    task,
    scheduler=st.sampled_from(available_schedulers()),
    seed=st.integers(0, 99),
    steps=st.integers(2, 6),
    guidance_scale=st.sampled_from([1.0, 5.0]),
    guess_mode=st.booleans(),
    samples=st.integers(1, 2),
    controls=st.sampled_from(
        [(), controls("canny"), controls("shuffle", "canny"), controls("depth", "depth"), controls("depth", "canny")]
    ),
    mode=st.sampled_from(Mode),
    strength=st.sampled_from([0.5, 0.8]),
    width=st.sampled_from([32, 64]),
    height=st.sampled_from([32, 48]),
).filter(lambda wanted: wanted.mode is not Mode.TEXT or not SCHEDULERS[wanted.scheduler].needs_image)


class Guest(NamedTuple):
    """A request of a crowd."""

    joins: int
    """Before which step."""
    cancelled: int | None
    """Before which step, if it is not done by then."""
    task: GenerationTask


def crowds(most: int) -> st.SearchStrategy[list[Guest]]:
    """Two guests at least."""
    moments = st.integers(0, 8)
    return st.lists(st.builds(Guest, moments, st.none() | moments, tasks), min_size=2, max_size=most)


def entertain(engine: Engine, guests: Sequence[tuple[Guest, GenerationRequest]]) -> dict[GenerationRequest, Outcome]:
    """Run the engine until the last guest has ended; how each did."""
    outcomes: dict[GenerationRequest, Outcome] = {}
    for step in range(10_000):
        for guest, request in guests:
            if guest.joins == step:
                engine.add(request)
            if guest.cancelled == step:
                engine.cancel(request.ref)
        outcomes |= {ended.request: ended.outcome for ended in engine.step()}
        if len(outcomes) == len(guests):
            return outcomes
    raise AssertionError("the engine did not finish")


def same_bits(one: RunningRequest, other: RunningRequest) -> bool:
    """Whether two requests drew the same latents and pictures, bit by bit."""
    drawn = [
        [picture.pixels.tobytes() for picture in running.pictures if picture.pixels is not None]
        for running in (one, other)
    ]
    return torch.equal(latents(one), latents(other)) and drawn[0] == drawn[1]
