"""The control maps of one attempt: what each is made from, which are the same, and where they are kept."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.annotators import keeps_lines
from serve_app.backend import Annotation, Backend
from serve_app.controls import CONTROL_TYPES
from serve_app.jobs.gather import gather
from serve_app.jobs.job import JobSpec
from serve_app.tasks import AnnotationTask, AttemptRef, ImageArray, MapInput, MapOutput, MapsTask

Use = tuple[str, bool]
"""An input field, and whether its picture is resized as a map of lines."""


@dataclass(frozen=True, slots=True)
class ControlMaps:
    """One of each per control of the task, in order."""

    annotations: tuple[Annotation, ...]
    keys: tuple[str, ...]
    """Object store keys of the maps as pictures; empty where they are not kept."""


def control_uses(spec: JobSpec) -> list[Use]:
    """What each control looks at."""
    return [
        (source, keeps_lines(control.control_type, control.annotator, control.auto_hint))
        for control, source in zip(spec.task.controls, spec.control_sources, strict=True)
    ]


async def make_maps(
    backend: Backend, spec: JobSpec, ref: AttemptRef, pictures: Mapping[Use, ImageArray]
) -> ControlMaps:
    """Make the maps; controls that ask for the same map share it, as a picture too.

    What an annotator draws at random follows from its picture alone: so the k-th picture of a request, made with
    ``seed + k``, is guided by the same map as the only picture of a request with that seed.
    """
    names = spec.output_names if isinstance(spec.task, MapsTask) else spec.map_names
    uses = control_uses(spec)
    wanted = [
        (control.control_type, control.annotator, tuple(sorted(control.params.items())), control.auto_hint, use)
        for control, use in zip(spec.task.controls, uses, strict=True)
    ]
    first = {one: wanted.index(one) for one in wanted}
    keys = {one: f"{ref.name}/{names[index]}" for one, index in first.items()} if names else {}

    async def annotate(control: MapInput, use: Use, key: str | None) -> Annotation:
        height, width = pictures[use].shape[:2]
        task = AnnotationTask(
            control_type=control.control_type,
            annotator=control.annotator,
            width=width,
            height=height,
            seed=zlib.crc32(pictures[use].data),
            auto_hint=control.auto_hint,
            params=control.params,
        )
        mask = pictures["mask_image", False] if CONTROL_TYPES[control.control_type].needs_mask else None
        output = MapOutput(key=key, base64_text=spec.output.base64_text) if key is not None else None
        return await backend.annotate(task, pictures[use], mask, output)

    made = await gather(annotate(spec.task.controls[at], uses[at], keys.get(one)) for one, at in first.items())
    annotations = dict(zip(first, made, strict=True))
    return ControlMaps(tuple(annotations[one] for one in wanted), tuple(keys[one] for one in wanted) if names else ())
