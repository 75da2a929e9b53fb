"""ANNOTATORS: what turns a photo into the control map that a ControlNet was trained on.

The geometry is decided here, once: the photo is resized straight to the output's size, as the engine does with init
images, and the annotator works on that. So a map has exactly the output's size, lines up with it, and lines are
drawn at the output's own resolution instead of being scaled afterwards.

A row is a string, so that importing this package imports no detector. To add an annotator: a function, a row, and its
name in ``serve_app.controls.CONTROL_TYPES``.
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import cast

import numpy as np

from serve_app.annotators.source import Annotator, AnnotatorRow, Param, Source
from serve_app.controls import CONTROL_TYPES, ControlType, control_type_problem
from serve_app.errors import AnnotatorUnavailable
from serve_app.images import resize_image, resize_map
from serve_app.tasks import AnnotationInfo, AnnotationTask, ControlMap, ImageArray

__all__ = ["ANNOTATORS", "Annotator", "AnnotatorRow", "Param", "Source", "annotate", "keeps_lines"]

ANNOTATORS: Mapping[str, AnnotatorRow] = {
    "canny": AnnotatorRow(
        "serve_app.annotators.edges:canny",
        (
            Param("low_threshold", 100, 0, 255, 1, "Gradient above which an edge goes on"),
            Param("high_threshold", 200, 0, 255, 1, "Gradient above which an edge starts"),
        ),
    ),
    "xdog": AnnotatorRow(
        "serve_app.annotators.edges:xdog",
        (Param("threshold", 32, 1, 128, 1, "How much darker than its surroundings a stroke is"),),
    ),
    "lineart_standard": AnnotatorRow(
        "serve_app.annotators.edges:lineart_standard",
        (
            Param("sigma", 6.0, 0.5, 32, 0.5, "Radius of the surroundings in pixels"),
            Param("threshold", 8, 0, 64, 1, "Contrast below which a pixel is ground when the brightness is set"),
        ),
    ),
    "shuffle": AnnotatorRow(
        "serve_app.annotators.pictures:shuffle",
        (Param("scale", 256, 16, 1024, 16, "Size of the folds in pixels"),),
    ),
    "tile": AnnotatorRow("serve_app.annotators.pictures:tile"),
    "inpaint": AnnotatorRow("serve_app.annotators.pictures:inpaint"),
}


def annotate(task: AnnotationTask, image: ImageArray, mask: ImageArray | None) -> tuple[ControlMap, AnnotationInfo]:
    """Make one control map, (task.height, task.width, 3).

    ``image`` is (h, w, 3) uint8 and ``mask`` (h, w) uint8, of any sizes. With ``auto_hint`` off the image already is
    the map and is only resized; control types that need a mask are the exception, because no picture can hold their
    map. CPU work, pure, safe in several threads at once.

    Raises:
        AnnotatorUnavailable: the control type is unknown or has no annotator here.
        JobError: a bad parameter, or no mask where one is needed.
    """
    problem = control_type_problem(task.control_type, task.auto_hint)
    if problem is not None:
        raise AnnotatorUnavailable(problem)
    kind = CONTROL_TYPES[task.control_type]
    image = resize_map(image, task.width, task.height, lines=keeps_lines(task.control_type, task.auto_hint))
    if kind.annotator is None or _is_sent(kind, task.auto_hint):
        return image, AnnotationInfo(control_type=task.control_type, annotator="none", empty=_empty(image))
    row = ANNOTATORS[kind.annotator]
    source = Source(
        image=image,
        mask=None if mask is None else resize_image(mask, task.width, task.height),
        seed=task.seed,
        params=row.read(task.params),
    )
    control_map = cast(Annotator, resolve_name(row.target))(source)
    return control_map, AnnotationInfo(
        control_type=task.control_type, annotator=kind.annotator, params=source.params, empty=_empty(control_map)
    )


def keeps_lines(control_type: str, auto_hint: bool) -> bool:
    """How ``annotate`` resizes its picture: as a map of lines (True) or as a photo; for who wants it resized before."""
    kind = CONTROL_TYPES[control_type]
    return kind.lines and _is_sent(kind, auto_hint)


def _is_sent(kind: ControlType, auto_hint: bool) -> bool:
    return not (auto_hint or kind.needs_mask)


def _empty(control_map: ControlMap) -> bool:
    """Whether a map guides nothing: all pixels alike, or, in the inpaint net's float form, none masked."""
    if control_map.dtype == np.float32:
        return bool((control_map >= 0).all())
    return bool((control_map == control_map[0, 0]).all())
