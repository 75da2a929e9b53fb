"""The seam between the CPU side (API, jobs) and the GPU side (annotators, engine).

``serve_app.local.LocalBackend`` does the work in this process; ``deployments.handles.RayBackend`` sends it to
replicas. Whoever calls a backend sees only the errors of ``serve_app.errors``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field

from serve_app.tasks import (
    AnnotationInfo,
    AnnotationTask,
    AttemptRef,
    GenerationResult,
    GenerationTask,
    ImageArray,
    MapOutput,
    OutputOptions,
    Value,
)


@dataclass(frozen=True, slots=True)
class Annotation:
    """A control map that may live in another process, and what is known of it."""

    info: AnnotationInfo
    handle: object
    """Opaque: given back to ``generate`` of the same backend. The array itself for LocalBackend."""


class DenoiserStats(Value):
    """A snapshot of one denoiser replica. Counters run from the start of the process."""

    replica: str
    node: str
    pid: int
    device: str
    families: tuple[str, ...]
    running: int
    waiting: int
    max_rows: int
    deterministic: bool
    """Whether its pictures are equal byte for byte under any load."""
    unet_forwards: int
    unet_rows: int
    generate_calls: int
    models: tuple[str, ...] = ()
    """Catalogue ids of what is loaded."""


class AnnotatorStats(Value):
    """A snapshot of one annotator replica."""

    replica: str
    node: str
    pid: int
    annotate_calls: int
    """Control maps handed out, made or cached."""
    annotator_runs: int = 0
    """Control maps really made."""
    missing: Mapping[str, str] = Field(default_factory=dict)
    """Annotator -> what it lacks on this replica, for those that cannot run."""


class BackendStats(Value):
    denoisers: tuple[DenoiserStats, ...] = ()
    annotators: tuple[AnnotatorStats, ...] = ()


class Backend(Protocol):
    async def annotate(
        self,
        task: AnnotationTask,
        image: ImageArray,
        mask: ImageArray | None = None,
        output: MapOutput | None = None,
    ) -> Annotation:
        """Make one control map of exactly ``task.width`` x ``task.height``.

        ``image`` is (h, w, 3) uint8 of any size; ``mask`` (h, w) uint8 is needed by control type ``inpaint`` only.
        ``output``: where the map is stored as a picture before this returns.

        Raises:
            AnnotatorUnavailable: the control type has no annotator here.
            RetryableError: the replica was lost or is busy.
        """
        ...

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None = None,
        mask: ImageArray | None = None,
        maps: Sequence[Annotation] = (),
    ) -> GenerationResult:
        """Draw the pictures of a task and store them under ``ref.name``.

        ``maps`` has one entry per ``task.controls``, in order.

        Raises:
            JobError: the task cannot be done, here or anywhere.
            Cancelled: ``cancel`` was called for this attempt.
            RetryableError: the replica was lost, is busy or ran out of memory.
        """
        ...

    async def cancel(self, ref: AttemptRef) -> None:
        """Stop the attempt at its next step boundary. Unknown attempts are ignored."""
        ...

    async def progress(self, refs: Collection[AttemptRef]) -> Mapping[AttemptRef, float]:
        """How far those of ``refs`` are that a denoiser runs right now: the share of their evaluations that is done,
        0 to 1, which never falls. Replicas that do not answer within 2 s are left out."""
        ...

    async def stats(self) -> BackendStats:
        """What every reachable replica reports; replicas that do not answer within 2 s are left out."""
        ...

    async def capacity(self) -> int:
        """How many jobs the denoisers can hold at once, running and waiting, over all replicas."""
        ...
