"""The training loop of every stage: seeded by step, resumable bit for bit, its curve written down.

What a step draws depends on the stage's seed and the step's number alone, so a checkpoint holds no random state:
weights, their moving average, the optimiser and the number of steps done.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

_CHECKPOINT = "checkpoint.pt"


class Stage(Protocol):
    """What is trained, and on what."""

    name: str
    seed: int
    trained: nn.Module

    def loss(self, step: int, random: np.random.Generator) -> Tensor:
        """The loss () of one batch. numpy draws from ``random``; torch was seeded for this step."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    steps: int
    rate: float
    """Greatest learning rate; it rises over ``warmup`` steps and falls by half a cosine to a twentieth."""
    warmup: int = 100
    decay: float = 0.999
    """Of the moving average of the weights, in the long run; it starts faster."""
    save_every: int = 100
    clip: float = 1.0
    """Greatest norm of a gradient."""

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


class Training:
    """One stage under way."""

    def __init__(self, stage: Stage, schedule: Schedule, folder: Path) -> None:
        """Continue from the checkpoint in ``folder``, or start; one process at a time."""
        self.stage, self.schedule, self.folder = stage, schedule, folder
        self.parameters = [parameter for parameter in stage.trained.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.done = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists():
            self._resume(torch.load(self._checkpoint, weights_only=True))

    def run(self, until: int | None = None, report: Callable[[str], None] = print) -> None:
        """Train up to step ``until``, by default to the end of the schedule."""
        end = self.schedule.steps if until is None else min(until, self.schedule.steps)
        losses: list[float] = []
        started = time.monotonic()
        while self.done < end:
            losses.append(self.step())
            if self.done % self.schedule.save_every == 0 or self.done == end:
                self.save(losses)
                report(
                    f"{self.stage.name} step {self.done}/{self.schedule.steps} loss {np.mean(losses):.5f} "
                    f"{(time.monotonic() - started) / len(losses):.2f} s a step"
                )
                losses, started = [], time.monotonic()

    def step(self) -> float:
        """One batch; returns its loss."""
        torch.manual_seed(self.stage.seed * 1_000_003 + self.done)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.done)
        loss = self.stage.loss(self.done, np.random.default_rng((self.stage.seed, self.done)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        decay = min(self.schedule.decay, (1 + self.done) / (10 + self.done))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return float(loss.detach())

    def save(self, losses: Iterable[float]) -> None:
        """Write the checkpoint and add the losses since the last one to the curve."""
        with (self.folder / "curve.jsonl").open("a") as curve:
            line = {"step": self.done, "loss": float(np.mean(list(losses))), "rate": self.schedule.rate_at(self.done)}
            curve.write(json.dumps(line) + "\n")
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(
            {
                "step": self.done,
                "weights": self.stage.trained.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
            },
            partial,
        )
        partial.replace(self._checkpoint)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / _CHECKPOINT

    def _resume(self, saved: dict[str, Any]) -> None:
        self.stage.trained.load_state_dict(saved["weights"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.average = saved["average"]
        self.done = saved["step"]
        curve = self.folder / "curve.jsonl"
        lines = curve.read_text().splitlines() if curve.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.done]
        curve.write_text("".join(line + "\n" for line in kept))


def curve(folder: Path) -> list[dict[str, float]]:
    """Step, mean loss since the step before, and learning rate, of every checkpoint of a stage."""
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def restore(module: nn.Module, folder: Path) -> int:
    """Put what a stage has learned so far, averaged, into ``module``; returns the number of its steps.

    Raises:
        FileNotFoundError: the stage has not saved anything yet.
    """
    checkpoint = folder / _CHECKPOINT
    if not checkpoint.exists():
        raise FileNotFoundError(f"{checkpoint}: run this stage first")
    saved = torch.load(checkpoint, weights_only=True)
    module.load_state_dict(saved["weights"])
    with torch.no_grad():
        for parameter, average in zip(module.parameters(), saved["average"], strict=True):
            parameter.copy_(average)
    return int(saved["step"])
