"""SCHEDULERS: the noise schedulers of the API, by the name a client sends. Strings only: no diffusers import here."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.errors import one_of


@dataclass(frozen=True, slots=True)
class SchedulerSpec:
    """One row: how a scheduler name is built from diffusers, and which sampler drives it.

    ``options`` override the base model's scheduler config; they are what diffusers' own SD pipelines need too.
    """

    class_name: str
    """Class in ``diffusers``."""
    options: Mapping[str, object] = field(default_factory=dict)
    karras: bool = False
    """Whether the class takes ``use_karras_sigmas``."""
    algorithm_types: tuple[str, ...] = ()
    """What ``algorithm_type`` may select."""
    sampler: str = "steps"
    """A key of ``serve_app.engine.samplers.SAMPLERS``; ``steps`` drives everything diffusers' SD pipelines can."""
    needs_image: bool = False
    """Whether there is nothing to draw without an init image. It is then used at strength 1 too."""


_DPM_SOLVERS = ("dpmsolver++", "dpmsolver+++")

SCHEDULERS: Mapping[str, SchedulerSpec] = {
    "DDPMScheduler": SchedulerSpec("DDPMScheduler", {"clip_sample": False}),
    "DDIMScheduler": SchedulerSpec("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "PNDMScheduler": SchedulerSpec("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "LMSDiscreteScheduler": SchedulerSpec("LMSDiscreteScheduler", karras=True),
    "EulerDiscreteScheduler": SchedulerSpec("EulerDiscreteScheduler", karras=True),
    "EulerAncestralDiscreteScheduler": SchedulerSpec("EulerAncestralDiscreteScheduler"),
    "DPMSolverMultistepScheduler": SchedulerSpec(
        "DPMSolverMultistepScheduler", karras=True, algorithm_types=_DPM_SOLVERS
    ),
    "HeunDiscreteScheduler": SchedulerSpec("HeunDiscreteScheduler", {"clip_sample": False}, karras=True),
    "KDPM2DiscreteScheduler": SchedulerSpec("KDPM2DiscreteScheduler", karras=True),
    "DPMSolverSinglestepScheduler": SchedulerSpec(
        "DPMSolverSinglestepScheduler", {"lower_order_final": True}, karras=True, algorithm_types=_DPM_SOLVERS
    ),
    "KDPM2AncestralDiscreteScheduler": SchedulerSpec("KDPM2AncestralDiscreteScheduler", karras=True),
    "UniPCMultistepScheduler": SchedulerSpec("UniPCMultistepScheduler", karras=True),
    "DDIMInverseScheduler": SchedulerSpec(
        "DDIMInverseScheduler",
        {"clip_sample": False, "set_alpha_to_one": False},
        sampler="inversion",
        needs_image=True,
    ),
    "DEISMultistepScheduler": SchedulerSpec("DEISMultistepScheduler", karras=True),
    "IPNDMScheduler": SchedulerSpec("IPNDMScheduler", sampler="ipndm"),
    "KarrasVeScheduler": SchedulerSpec("KarrasVeScheduler", sampler="karras_ve"),
    "ScoreSdeVeScheduler": SchedulerSpec("ScoreSdeVeScheduler", sampler="score_sde_ve"),
    "LCMScheduler": SchedulerSpec("LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DPMSolverSDEScheduler": SchedulerSpec("DPMSolverSDEScheduler", karras=True),
}

DEFAULT_SCHEDULER = "UniPCMultistepScheduler"

ALGORITHM_TYPES = ("none", "dpmsolver++", "dpmsolver+++")
"""What the wire field accepts; ``dpmsolver+++`` is the hosted API's spelling of the same algorithm."""


def available_schedulers() -> tuple[str, ...]:
    return tuple(SCHEDULERS)


def scheduler_problem(name: str) -> str | None:
    """Why ``name`` can't be used, as a message for the client, or None."""
    return None if name in SCHEDULERS else one_of("scheduler", name, available_schedulers())


def needs_image_problem(name: str) -> str | None:
    """Why ``name`` can't draw without an init image, as a message for the client; None where it can."""
    spec = SCHEDULERS.get(name)
    if spec is None or not spec.needs_image:
        return None
    return f"The scheduler {name!r} needs an init_image: it takes a picture back to noise and draws it anew."
