"""What the engine is asked, and the state of a request while it runs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from serve_app.controls import CONTROL_TYPES
from serve_app.engine.architecture import check_base, check_fit, check_net
from serve_app.engine.batching import Group
from serve_app.engine.conditions import Conditions, conditions
from serve_app.engine.samplers import ModelCall, Sampler
from serve_app.errors import FamilyMismatch, JobError, ServeError
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.models.sources import INPAINT_CHANNELS
from serve_app.tasks import AttemptRef, ControlMap, GenerationTask, ImageArray, Mode


@dataclass(frozen=True, slots=True, eq=False)
class GenerationRequest:
    """One task with everything it needs, ready for the engine. Two requests are never equal, whatever they ask.

    Raises:
        FamilyMismatch: a ControlNet belongs to another base family.
        ModelLoadFailed: the base model or a ControlNet is of a kind this engine cannot run.
        JobError: a picture is missing or has the wrong size, or a union net does not know a control's type.
    """

    ref: AttemptRef
    task: GenerationTask
    base: BaseComponents
    nets: tuple[NetComponents, ...] = ()
    """One per control of the task, in order."""
    init_image: ImageArray | None = None
    mask: ImageArray | None = None
    maps: tuple[ControlMap, ...] = ()
    """One per control of the task, in order."""

    def __post_init__(self) -> None:
        check_families(self.base, self.nets)
        check_base(self.base)
        for net in self.nets:
            check_net(net)
            check_fit(self.base, net)
        _check_mode(self.base, self.task.mode)
        _check_pictures(self.task, self.base.vae_scale, self.init_image, self.mask)
        _check_maps(self.task, self.nets, self.maps)
        _check_union_types(self.task, self.nets)

    @property
    def guided(self) -> bool:
        """Whether an unconditional row runs beside the conditional one."""
        return self.task.guidance_scale > 1

    @property
    def rows(self) -> int:
        """Rows of one picture."""
        return 2 if self.guided else 1

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width in latent cells."""
        return self.task.height // self.base.vae_scale, self.task.width // self.base.vae_scale

    @property
    def inpaint_unet(self) -> bool:
        """Whether the UNet takes mask and masked image as input."""
        return bool(self.base.unet.config.in_channels == INPAINT_CHANNELS)


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the text says to the models; the unconditional row first, where there is one."""

    text: Tensor
    """(rows, tokens, d), for the cross-attention."""
    pooled: Tensor | None = None
    """(rows, p): the pooled embedding that SDXL adds to the time embedding."""
    sizes: Tensor | None = None
    """(rows, 6): SDXL's original size, crop corner and target size, in pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Hint:
    """One control map of a running request, as its net takes it."""

    embedded: Tensor
    """(1, c, h, w): what it adds to the net's first feature map, which no step changes."""
    scale: float
    start: float
    end: float

    def active(self, call: ModelCall) -> bool:
        """Whether it has a say at this timestep (diffusers' ``controlnet_keep``)."""
        outside = call.index / call.of < self.start or (call.index + 1) / call.of > self.end
        return self.scale != 0 and not outside


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """One forward of a ControlNet for a running request."""

    net: NetComponents
    hints: tuple[Hint, ...]
    """One; for a union net all controls of the request that name it."""
    scale: float
    """Of the residuals. Several hints of a union net have theirs inside and 1 here."""
    conditional_only: bool
    """Leave the unconditional row alone: guess mode, and nets that average over the picture."""
    fading: bool
    """Weaken the shallow residuals: guess mode, but not for nets that average over the picture."""
    embedding: Tensor | None = None
    """(1, e): what a union net adds to the time embedding for the types of its controls."""

    def active(self, call: ModelCall) -> bool:
        """Whether the net has a say at this timestep.

        diffusers runs a union net even if the scales of all its controls are zero, and adds what the net makes of the
        types alone; here no control is no guidance.
        """
        return any(hint.active(call) for hint in self.hints)

    def hint(self, call: ModelCall) -> Tensor:
        """(1, c, h, w): what the maps that are active at this timestep add to the net's first feature map."""
        first, *others = (hint.embedded for hint in self.hints if hint.active(call))
        return sum(others, start=first)


@dataclass(slots=True, eq=False)
class Picture:
    """One picture of a running request: waits for a prediction, then for the VAE, then for its neighbours."""

    sampler: Sampler
    served: int
    """The turn in which it was last served, or in which it joined."""
    call: ModelCall | None = None
    """What the sampler waits for; None once the latent is final."""
    latent: Tensor | None = None
    """(1, 4, h, w), the final one."""
    pixels: ImageArray | None = None
    """(H, W, 3) uint8."""
    progress: float = 0.0
    """Share of its evaluations that are done. Other threads read it."""

    def begin(self) -> None:
        """Draw the noise and ask the first question."""
        self.call = next(self.sampler)

    def advance(self, prediction: Tensor, turn: int) -> None:
        """Answer the sampler's call with the guided prediction (1, 4, h, w)."""
        self.served = turn
        try:
            self.call = self.sampler.send(prediction)
        except StopIteration as end:
            self.call, self.latent = None, end.value
            self.progress = 1.0
        else:
            self.progress = self.call.progress


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request that holds engine state."""

    request: GenerationRequest
    conditioning: Conditioning
    controls: tuple[Control, ...]
    pictures: Sequence[Picture]
    started_at: float = field(default_factory=time.monotonic)
    forwards: int = 0
    """UNet forwards that at least one of its pictures took part in."""
    forward_rows: int = 0
    """Rows of those forwards, neighbours included."""
    _conditions: dict[nn.Module, Conditions] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> Group:
        base, (height, width) = self.request.base, self.request.latent_size
        return Group(f"{base.id}@{base.hash}", height, width, int(self.conditioning.text.shape[1]))

    def conditions(self, model: nn.Module) -> Conditions:
        """What the text says to the UNet or to a ControlNet: computed once."""
        if model not in self._conditions:
            said = self.conditioning
            self._conditions[model] = conditions(model, said.text, said.pooled, said.sizes)
        return self._conditions[model]

    @property
    def progress(self) -> float:
        """Share of all its evaluations that are done, 0 to 1; decoding counts for nothing."""
        return sum(picture.progress for picture in self.pictures) / len(self.pictures)

    @property
    def done(self) -> bool:
        return all(picture.pixels is not None for picture in self.pictures)


class Seat(NamedTuple):
    """A picture's place in a forward."""

    running: RunningRequest
    picture: Picture
    call: ModelCall

    @property
    def rows(self) -> int:
        """Rows of this forward that the picture takes: 2 with guidance, else 1."""
        return 1 if self.call.conditional_only else self.running.request.rows


@dataclass(frozen=True, slots=True, eq=False)
class Ended:
    """How a request left the engine: with every picture drawn, or with an error."""

    request: GenerationRequest
    outcome: RunningRequest | ServeError


def check_families(base: BaseComponents, nets: Sequence[NetComponents]) -> None:
    """Raises FamilyMismatch for the first net that was trained for another base family."""
    for net in nets:
        if net.family != base.family:
            raise FamilyMismatch(
                f"The ControlNet {net.id!r} is made for {net.family} models, {base.id!r} is a {base.family} model."
            )


def _check_mode(base: BaseComponents, mode: Mode) -> None:
    if base.unet.config.in_channels == INPAINT_CHANNELS and mode is not Mode.MASKED:
        raise JobError(f"The model {base.id!r} is made for inpainting: it needs an init image and a mask.")


def _check_pictures(task: GenerationTask, cell: int, image: ImageArray | None, mask: ImageArray | None) -> None:
    if task.width % cell or task.height % cell:
        raise JobError(f"Width and height must be multiples of {cell}, not {task.width}x{task.height}.")
    if task.mode is not Mode.TEXT and image is None:
        raise JobError(f"Mode {task.mode} needs an init image.")
    if task.mode is Mode.MASKED and mask is None:
        raise JobError(f"Mode {task.mode} needs a mask.")


def _check_maps(task: GenerationTask, nets: Sequence[NetComponents], maps: Sequence[ControlMap]) -> None:
    if not len(task.controls) == len(nets) == len(maps):
        raise JobError(f"{len(task.controls)} controls came with {len(nets)} nets and {len(maps)} control maps.")
    for control, drawn in zip(task.controls, maps, strict=True):
        if drawn.shape != (task.height, task.width, 3):
            raise JobError(
                f"The control map for {control.control_type} is {drawn.shape}, not {(task.height, task.width, 3)}."
            )
        if drawn.dtype not in {np.dtype(np.uint8), np.dtype(np.float32)}:
            raise JobError(f"The control map for {control.control_type} is {drawn.dtype}, not uint8 or float32.")


def union_index(net: NetComponents, control_type: str) -> int | None:
    """Under which number the union ``net`` knows ``control_type``; None if it does not."""
    row = CONTROL_TYPES.get(control_type)
    known = row is not None and row.union is not None and row.union < net.net.config.num_control_type
    return row.union if row is not None and known else None


def _check_union_types(task: GenerationTask, nets: Sequence[NetComponents]) -> None:
    for control, net in zip(task.controls, nets, strict=True):
        if net.union and union_index(net, control.control_type) is None:
            known = [name for name in CONTROL_TYPES if union_index(net, name) is not None]
            raise JobError(
                f"The ControlNet-Union {net.id!r} cannot be guided by {control.control_type!r}; "
                f"it can by {', '.join(known)}."
            )
