"""What turns a photo into the control map that a ControlNet was trained on.

The geometry is decided here, once: the photo is resized straight to the output's size, as the engine does with init
images, and the annotator works on that. So a map has exactly the output's size, lines up with it, and lines are
drawn at the output's own resolution instead of being scaled afterwards.

A row of ANNOTATORS is a string, so that importing this package imports no detector. To add an annotator: a function, a
row in ``table.py``, where it has weights a row each in ``weights.py``, and its name in
``serve_app.controls.CONTROL_TYPES``.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pkgutil import resolve_name
from typing import Any, cast

import numpy as np

from serve_app.annotators.source import Annotator, AnnotatorRow, Networks, Param, Source, Switch
from serve_app.annotators.table import ANNOTATORS
from serve_app.annotators.weights import Missing, Readiness, Ready, WeightStore
from serve_app.controls import CONTROL_TYPES, annotator_problem, control_type_problem
from serve_app.errors import AnnotatorUnavailable
from serve_app.images import resize_image, resize_map
from serve_app.tasks import AnnotationInfo, AnnotationTask, ControlMap, ImageArray

__all__ = [
    "ANNOTATORS",
    "Annotator",
    "AnnotatorRow",
    "Missing",
    "Networks",
    "Param",
    "Readiness",
    "Ready",
    "Source",
    "Switch",
    "annotate",
    "chosen_annotator",
    "keeps_lines",
    "readiness",
]


def readiness(store: WeightStore) -> dict[str, Readiness]:
    """Which annotators can run with the weights on this machine, and what the others lack. Reads no file's content."""
    return store.readiness(ANNOTATORS)


def annotate(
    task: AnnotationTask, image: ImageArray, mask: ImageArray | None, networks: Networks | None = None
) -> tuple[ControlMap, AnnotationInfo]:
    """Make one control map, (task.height, task.width, 3).

    ``image`` is (h, w, 3) uint8 and ``mask`` (h, w) uint8, of any sizes. With ``auto_hint`` off, or with the annotator
    ``none``, the image already is the map and is only resized; control types that need a mask are the exception,
    because no picture can hold their map. ``networks``: where detectors with weights get them; None: there are none.
    CPU work save for what the networks do, pure, safe in several threads at once.

    Raises:
        AnnotatorUnavailable: the control type is unknown, does not have this annotator, or its weights are missing.
        JobError: a bad parameter, or no mask where one is needed.
        RetryableError: the device of the networks is full or broke.
    """
    name = chosen_annotator(task.control_type, task.annotator, task.auto_hint)
    lines = keeps_lines(task.control_type, task.annotator, task.auto_hint)
    image = resize_map(image, task.width, task.height, lines=lines)
    if name is None:
        return image, AnnotationInfo(control_type=task.control_type, annotator="none", empty=_empty(image))
    row = ANNOTATORS[name]
    params = row.read(task.params)
    with _leased(row, networks) as loaded:
        source = Source(
            image=image,
            mask=None if mask is None else resize_image(mask, task.width, task.height),
            seed=task.seed,
            params=params,
            networks=loaded,
        )
        control_map = cast(Annotator, resolve_name(row.target))(source)
    return control_map, AnnotationInfo(
        control_type=task.control_type, annotator=name, params=params, empty=_empty(control_map)
    )


def chosen_annotator(control_type: str, annotator: str | None, auto_hint: bool) -> str | None:
    """The row of ANNOTATORS that makes the map; None where the picture already is the map.

    Raises:
        AnnotatorUnavailable: the control type is unknown, or does not have this annotator.
    """
    problem = control_type_problem(control_type) or annotator_problem(control_type, annotator)
    if problem is not None:
        raise AnnotatorUnavailable(problem)
    kind = CONTROL_TYPES[control_type]
    name = annotator or kind.annotator
    return None if name == "none" or not (auto_hint or kind.needs_mask) else name


def _leased(row: AnnotatorRow, networks: Networks | None) -> AbstractContextManager[Mapping[str, Any]]:
    if not row.networks:
        return nullcontext({})
    if networks is None:
        raise AnnotatorUnavailable("The annotator is not available: no detector networks are served here.")
    return networks.lease(row.networks)


def keeps_lines(control_type: str, annotator: str | None, auto_hint: bool) -> bool:
    """How ``annotate`` resizes its picture: as a map of lines (True) or as a photo; for who wants it resized before.

    Raises:
        AnnotatorUnavailable: as ``chosen_annotator``.
    """
    name = chosen_annotator(control_type, annotator, auto_hint)
    return CONTROL_TYPES[control_type].lines and (name is None or ANNOTATORS[name].pixelwise)


def _empty(control_map: ControlMap) -> bool:
    """Whether a map guides nothing: all pixels alike, or, in the inpaint net's float form, none masked."""
    if control_map.dtype == np.float32:
        return bool((control_map >= 0).all())
    return bool((control_map == control_map[0, 0]).all())
