"""A Backend that follows a script: what each attempt at a job does, in order."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.backend import Annotation, BackendStats
from serve_app.storage import ObjectStore
from serve_app.tasks import (
    AnnotationInfo,
    AnnotationTask,
    AttemptRef,
    GenerationResult,
    GenerationTask,
    ImageArray,
    MapOutput,
    OutputOptions,
)

HANG = "hang"
Step = BaseException | str


@dataclass
class ScriptedBackend:
    """Each call of ``generate`` takes the next step: raises it, hangs until ``go``, or draws when none is left.

    Every call, whatever comes of it, first leaves a file under the attempt's name, as a real one may.
    """

    objects: ObjectStore
    script: list[Step] = field(default_factory=list)
    annotate_script: list[BaseException] = field(default_factory=list)
    """What the first calls of ``annotate`` raise."""
    places: int = 100
    go: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: list[AttemptRef] = field(default_factory=list)
    cancelled: list[AttemptRef] = field(default_factory=list)
    annotated: list[tuple[AnnotationTask, ImageArray, ImageArray | None]] = field(default_factory=list)
    drawn_with: list[tuple[ImageArray | None, ImageArray | None, tuple[object, ...]]] = field(default_factory=list)
    most_at_once: int = 0
    shares: list[float] = field(default_factory=list)
    """What each attempt is said to have done when asked, by its number; none when the list is too short."""
    mute: bool = False
    """Never answer when asked for progress."""
    _now: int = 0

    async def annotate(
        self,
        task: AnnotationTask,
        image: ImageArray,
        mask: ImageArray | None = None,
        output: MapOutput | None = None,
    ) -> Annotation:
        self.annotated.append((task, image, mask))
        if self.annotate_script:
            raise self.annotate_script.pop(0)
        if output is not None:
            await asyncio.to_thread(self.objects.put, output.key, b"map", "image/png")
        info = AnnotationInfo(control_type=task.control_type, annotator="scripted")
        return Annotation(info, f"map {len(self.annotated)}")

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None = None,
        mask: ImageArray | None = None,
        maps: Sequence[Annotation] = (),
    ) -> GenerationResult:
        self.attempts.append(ref)
        self.drawn_with.append((init_image, mask, tuple(item.handle for item in maps)))
        step = self.script.pop(0) if self.script else None
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.to_thread(self.objects.put, f"{ref.name}/partial", b"x", "image/png")
            if step == HANG:
                await self.go.wait()
            if isinstance(step, BaseException):
                raise step
            keys = tuple(f"{ref.name}/{output.file_name(n)}" for n in range(task.samples))
            for key in keys:
                await asyncio.to_thread(self.objects.put, key, b"picture", "image/png")
        finally:
            self._now -= 1
        return GenerationResult(
            keys=keys, model_hash="hash", unet_forwards=task.steps, mean_rows=1.0, queue_s=0.0, run_s=0.1
        )

    async def cancel(self, ref: AttemptRef) -> None:
        self.cancelled.append(ref)

    async def progress(self, refs: Collection[AttemptRef]) -> Mapping[AttemptRef, float]:
        if self.mute:
            await asyncio.Event().wait()
        return {ref: self.shares[ref.attempt - 1] for ref in refs if ref.attempt <= len(self.shares)}

    async def stats(self) -> BackendStats:
        return BackendStats()

    async def capacity(self) -> int:
        return self.places
