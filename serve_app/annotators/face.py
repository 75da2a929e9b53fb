"""Faces as the MediaPipe face ControlNet was taught: found by MediaPipe's FaceLandmarker, drawn as coloured contours.

mediapipe is optional and imported on first use. The drawing needs only landmarks.
"""

import importlib
import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2

from serve_app.annotators.geometry import at_resolution
from serve_app.annotators.skeleton import Point, blank
from serve_app.annotators.source import Source
from serve_app.annotators.weights import MEDIAPIPE_REMEDY
from serve_app.errors import AnnotatorUnavailable
from serve_app.tasks import ControlMap

logger = logging.getLogger(__name__)

_SMALLEST = 64
"""Faces whose shorter side has fewer pixels are not drawn, as in the training data of CrucibleAI's net."""


def _chain(*points: int) -> tuple[tuple[int, int], ...]:
    return tuple(pairwise(points))


# The connections are MediaPipe's (FACEMESH_*). Its left and right are the person's. The colours are RGB: the training
# code drew with these triples in the order B, G, R and turned the picture round, so that red and blue, and with them
# the two sides, are swapped against the constants in it.
_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109, 10),
)
_CONTOURS: tuple[tuple[tuple[int, int, int], tuple[tuple[int, int], ...]], ...] = (
    ((10, 200, 10), _chain(*_OVAL)),
    (  # left eye
        (10, 200, 180),
        _chain(263, 249, 390, 373, 374, 380, 381, 382, 362) + _chain(263, 466, 388, 387, 386, 385, 384, 398, 362),
    ),
    ((10, 220, 180), _chain(276, 283, 282, 295, 285) + _chain(300, 293, 334, 296, 336)),  # left brow
    (  # right eye
        (180, 200, 10),
        _chain(33, 7, 163, 144, 145, 153, 154, 155, 133) + _chain(33, 246, 161, 160, 159, 158, 157, 173, 133),
    ),
    ((180, 220, 10), _chain(46, 53, 52, 65, 55) + _chain(70, 63, 105, 66, 107)),  # right brow
    (  # lips
        (10, 180, 10),
        _chain(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
        + _chain(61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
        + _chain(78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
        + _chain(78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308),
    ),
)
_IRISES = {468: (250, 200, 10), 473: (10, 200, 250)}
"""Centre of the right and of the left iris."""


def mediapipe_face(source: Source) -> ControlMap:
    """Contours and irises of up to ``max_faces`` faces.

    Raises:
        AnnotatorUnavailable: mediapipe is not installed, does not fit, or can't read the model.
    """
    image = at_resolution(source)
    height, width = source.image.shape[:2]
    canvas = blank(height, width)
    for landmarks in _landmarks(image, source):
        xs, ys = ([point[axis] for point in landmarks] for axis in (0, 1))
        if min((max(xs) - min(xs)) * image.shape[1], (max(ys) - min(ys)) * image.shape[0]) >= _SMALLEST:
            draw_contours(canvas, landmarks)
    return canvas


def draw_contours(canvas: ControlMap, landmarks: Sequence[Point]) -> None:
    """Draw one face in place: 478 landmarks, (x, y) in 0..1; lines 2 pixels wide, irises as 4 x 4 squares.

    What lies outside the picture is not drawn. As ``generate_annotation`` of controlnet-aux 0.0.10.
    """
    height, width = canvas.shape[:2]
    for colour, connections in _CONTOURS:
        for start, end in connections:
            ends = [landmarks[start], landmarks[end]]
            if all(0 <= x <= 1 and 0 <= y <= 1 for x, y in ends):
                first, second = ((min(int(x * width), width - 1), min(int(y * height), height - 1)) for x, y in ends)
                cv2.line(canvas, first, second, colour, 2)
    for index, colour in _IRISES.items():
        x, y = landmarks[index]
        if 0 <= x < 1 and 0 <= y < 1:
            column, row = int(x * width), int(y * height)
            canvas[max(0, row - 2) : row + 2, max(0, column - 2) : column + 2] = colour


def load(path: Path) -> bytes:
    """The model, for a landmarker is made of it per call. Whoever loads it has checked its hash: MediaPipe runs it."""
    return path.read_bytes()


def _landmarks(image: ControlMap, source: Source) -> list[list[Point]]:
    """478 landmarks of each face. A landmarker per call: options differ between requests, and it holds state."""
    try:
        mediapipe: Any = importlib.import_module("mediapipe")
    except Exception as error:  # an installation that does not fit raises anything
        raise _unavailable("mediapipe cannot be imported", error) from error
    try:
        vision: Any = mediapipe.tasks.vision
        options = vision.FaceLandmarkerOptions(
            base_options=mediapipe.tasks.BaseOptions(model_asset_buffer=source.networks["face_landmarker"]),
            num_faces=int(source.params["max_faces"]),
            min_face_detection_confidence=source.params["min_confidence"],
        )
        with vision.FaceLandmarker.create_from_options(options) as landmarker:
            picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image)
            return [[(point.x, point.y) for point in face] for face in landmarker.detect(picture).face_landmarks]
    except (AttributeError, OSError, RuntimeError, ValueError) as error:  # a library or a symbol that is not there, too
        raise _unavailable("mediapipe does not work here", error) from error


def _unavailable(what: str, error: Exception) -> AnnotatorUnavailable:
    """The library's own words may name paths of this machine: they are for the log."""
    logger.error(what, exc_info=error)
    return AnnotatorUnavailable(f"The annotator is not available: {what}; install it again: {MEDIAPIPE_REMEDY}.")
