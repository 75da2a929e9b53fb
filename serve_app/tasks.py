"""What a request asks of the GPUs, and what comes back: frozen values that cross process borders.

Knows nothing of HTTP, of jobs or of torch.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

ImageArray = NDArray[np.uint8]
"""An RGB picture, (H, W, 3) uint8, or a mask, (H, W) uint8 with 255 = repaint."""

ControlMap = NDArray[Any]
"""(H, W, 3) at the output's size: uint8 0..255, or float32 0..1 with -1 where the inpaint net must see 'masked'."""

JsonScalar = str | int | float | bool | None


class Mode(StrEnum):
    TEXT = "text"
    IMAGE = "image"
    MASKED = "masked"


class Value(BaseModel):
    """A frozen value: a change makes a copy (``model_copy(update=...)``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MapInput(Value):
    """How one control map is made from a picture."""

    control_type: str
    annotator: str | None = None
    """Name of the annotator; None: the default of the control type."""
    params: Mapping[str, JsonScalar] = Field(default_factory=dict)
    """The annotator's parameters; what is left out has its default."""
    auto_hint: bool = True
    """True: an annotator makes the control map; False: the given image is the control map."""


class ControlInput(MapInput):
    """One ControlNet of a task."""

    net: str
    """Catalogue id of the ControlNet, already resolved (never ``canny``, but the net that ``canny`` means)."""
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    """The control window, as fractions of the steps."""


class GenerationTask(Value):
    """One request to the diffusion engine. Sizes in pixels; every name is already checked."""

    model: str
    family: str
    prompt: str = ""
    negative_prompt: str = ""
    width: int
    height: int
    samples: Annotated[int, Field(ge=1, le=4)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Image k is drawn with ``seed + k`` (modulo 2**32)."""
    scheduler: str
    steps: Annotated[int, Field(ge=1)]
    guidance_scale: float = 7.5
    """At 1 or below, the unconditional row is left out."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    use_karras_sigmas: bool = True
    algorithm_type: str = "none"
    guess_mode: bool = False
    clip_skip: int | None = None
    controls: tuple[ControlInput, ...] = ()
    mode: Mode = Mode.TEXT
    """TEXT draws from noise; IMAGE starts from the init image; MASKED repaints the masked part of it."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed per image."""
        return tuple((self.seed + k) % 2**32 for k in range(self.samples))


class MapsTask(Value):
    """Control maps of one picture; nothing is drawn."""

    controls: Annotated[tuple[MapInput, ...], Field(min_length=1)]
    width: int | None = None
    height: int | None = None
    """Pixels; None: as ``serve_app.images.fitting_size`` says, from the picture's own size."""
    max_width: int
    max_height: int


class AnnotationTask(Value):
    """One control map to make."""

    control_type: str
    annotator: str | None = None
    """Name of the annotator; None: the default of the control type."""
    width: int
    height: int
    seed: int = 0
    """For annotators that draw random numbers (shuffle); derived from the picture, not from the request's seed."""
    auto_hint: bool = True
    params: Mapping[str, JsonScalar] = Field(default_factory=dict)


class AnnotationInfo(Value):
    """What an annotator really did; echoed in ``meta.annotators``."""

    control_type: str
    annotator: str
    """Which detector ran; ``none`` where the picture was taken as the control map."""
    params: Mapping[str, JsonScalar] = Field(default_factory=dict)
    """The effective parameters, defaults included."""
    empty: bool = False
    """True when the map holds nothing that could guide a ControlNet."""


class AttemptRef(Value):
    """Which attempt at which job a call belongs to. The attempt number fences files and rows."""

    job_id: int
    attempt: int
    alone: bool = False
    """Run with no neighbours in the batch: the job is suspected of killing its worker."""

    @property
    def name(self) -> str:
        """The prefix under which this attempt's files are stored."""
        return f"attempts/{self.job_id}/{self.attempt}"


class OutputOptions(Value):
    """How pictures are stored."""

    file_prefix: str
    base64_text: bool = False
    """Store base64 text instead of PNG bytes (``base64: yes``)."""

    def file_name(self, index: int) -> str:
        return f"{self.file_prefix}-{index}.png"

    def map_name(self, index: int) -> str:
        """Of the map of control ``index``, where maps are stored beside the pictures."""
        return f"{self.file_prefix}-control-{index}.png"


class MapOutput(Value):
    """Where a control map is stored as a picture."""

    key: str
    """Object store key."""
    base64_text: bool = False
    """As in ``OutputOptions``."""


class GenerationResult(Value):
    """What a finished generation left behind."""

    keys: tuple[str, ...]
    """Object store keys of the pictures, in order, under the attempt's name."""
    model_hash: str
    net_hashes: tuple[str, ...] = ()
    unet_forwards: int
    """UNet forward calls this request took part in."""
    mean_rows: float
    """Mean number of rows in those calls, neighbours included."""
    queue_s: float
    run_s: float
    """Seconds waiting in the engine, and from the first step to the stored picture."""
