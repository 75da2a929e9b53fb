"""SCHEDULERS: the noise schedulers of the API, by the name a client sends. Strings only: no diffusers import here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.errors import one_of


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """One row: how a scheduler name is built from diffusers.

    ``options`` override the base model's scheduler config; they are what diffusers' own SD pipelines need too.
    """

    class_name: str
    """Class in ``diffusers``; empty where the name is known to clients but cannot be served yet."""
    options: Mapping[str, object] = field(default_factory=dict)
    karras: bool = False
    """Whether the class takes ``use_karras_sigmas``."""
    algorithm_types: tuple[str, ...] = ()
    """What ``algorithm_type`` may select."""

    @property
    def available(self) -> bool:
        return bool(self.class_name)


_PENDING = SchedulerSpec("")

SCHEDULERS: Mapping[str, SchedulerSpec] = {
    "DDPMScheduler": _PENDING,
    "DDIMScheduler": SchedulerSpec("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "PNDMScheduler": _PENDING,
    "LMSDiscreteScheduler": _PENDING,
    "EulerDiscreteScheduler": SchedulerSpec("EulerDiscreteScheduler", karras=True),
    "EulerAncestralDiscreteScheduler": SchedulerSpec("EulerAncestralDiscreteScheduler"),
    "DPMSolverMultistepScheduler": SchedulerSpec(
        "DPMSolverMultistepScheduler", karras=True, algorithm_types=("dpmsolver++", "dpmsolver+++")
    ),
    "HeunDiscreteScheduler": _PENDING,
    "KDPM2DiscreteScheduler": _PENDING,
    "DPMSolverSinglestepScheduler": _PENDING,
    "KDPM2AncestralDiscreteScheduler": _PENDING,
    "UniPCMultistepScheduler": SchedulerSpec("UniPCMultistepScheduler", karras=True),
    "DDIMInverseScheduler": _PENDING,
    "DEISMultistepScheduler": _PENDING,
    "IPNDMScheduler": _PENDING,
    "KarrasVeScheduler": _PENDING,
    "ScoreSdeVeScheduler": _PENDING,
    "LCMScheduler": _PENDING,
}

DEFAULT_SCHEDULER = "UniPCMultistepScheduler"

ALGORITHM_TYPES = ("none", "dpmsolver++", "dpmsolver+++")
"""What the wire field accepts; ``dpmsolver+++`` is the hosted API's spelling of the same algorithm."""


def available_schedulers() -> tuple[str, ...]:
    return tuple(name for name, spec in SCHEDULERS.items() if spec.available)


def scheduler_problem(name: str) -> str | None:
    """Why ``name`` can't be used, as a message for the client, or None."""
    spec = SCHEDULERS.get(name)
    if spec is None:
        return one_of("scheduler", name, available_schedulers())
    if not spec.available:
        return f"The scheduler {name!r} is not available yet. Allowed: {', '.join(available_schedulers())}."
    return None
