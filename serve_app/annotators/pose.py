"""OpenPose: people, and on request their hands and faces, found in a photo and drawn at the output's size.

The search for peaks and limbs is controlnet-aux's (``Body``, ``Hand``, ``Face``), without its constructors, which read
pickles, and without its package's ``__init__``, which sets an environment variable.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.annotators.geometry import at_resolution
from serve_app.annotators.isolation import part
from serve_app.annotators.skeleton import Points, blank, draw_body, draw_face, draw_hand
from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap, ImageArray

_WIDEST = 4
"""The body network works at a fixed height of 184; wider strips than this would grow without bound."""
CLOSE_UPS = 8
"""People, the largest, whose hands and faces are looked for, where a hand takes seconds on a CPU. The bodies of all are
drawn."""
_GREY = (128, 128, 128)
"""What OpenPose continues pictures with."""


def body(source: Source) -> ControlMap:
    return _drawn(source, hands=False, faces=False)


def hand(source: Source) -> ControlMap:
    return _drawn(source, hands=True, faces=False)


def face(source: Source) -> ControlMap:
    return _drawn(source, hands=False, faces=True)


def full(source: Source) -> ControlMap:
    return _drawn(source, hands=True, faces=True)


def _drawn(source: Source, *, hands: bool, faces: bool) -> ControlMap:
    """Realtime Multi-Person 2D Pose Estimation (Cao et al., 2017); hands and faces: Simon et al., 2017."""
    image = at_resolution(source)[:, :, ::-1]  # BGR
    height, width = image.shape[:2]
    image = cv2.copyMakeBorder(
        np.ascontiguousarray(image), 0, max(0, width // _WIDEST - height), 0, 0, cv2.BORDER_CONSTANT, value=_GREY
    )
    size = np.array([width, height])
    finder = _finder("body.Body", source.networks["openpose_body"])
    canvas = blank(*source.image.shape[:2])
    people = finder.format_body_result(*finder(image))
    near = {id(person) for person in sorted(people, key=_extent, reverse=True)[:CLOSE_UPS]}
    for person in people:
        points = [None if point is None else (point.x / width, point.y / height) for point in person.keypoints]
        draw_body(canvas, points)
        if id(person) not in near:
            continue
        if hands:
            for found in _hands(source, person, image, size):
                draw_hand(canvas, found)
        if faces:
            for found in _face(source, person, image, size):
                draw_face(canvas, found)
    return canvas


def _extent(person: Any) -> float:
    """Pixels across plus down that the found points of a body span."""
    found = np.array([(point.x, point.y) for point in person.keypoints if point is not None])
    return float(np.ptp(found, axis=0).sum()) if len(found) else 0.0


def _hands(source: Source, person: Any, image: ImageArray, size: NDArray[np.int_]) -> Iterator[Points]:
    """21 points of each hand whose arm was found."""
    finder = _finder("hand.Hand", source.networks["openpose_hand"])
    for x, y, side, _ in part("open_pose.util").handDetect(person, image):
        yield _placed(finder(image[y : y + side, x : x + side]), x, y, size)


def _face(source: Source, person: Any, image: ImageArray, size: NDArray[np.int_]) -> Iterator[Points]:
    """The points of the face that were found, if there is a head of at least 20 pixels."""
    box = part("open_pose.util").faceDetect(person, image)
    if box is None:
        return
    finder = _finder("face.Face", source.networks["openpose_face"])
    x, y, side = box
    peaks = finder.compute_peaks_from_heatmaps(finder(np.ascontiguousarray(image[y : y + side, x : x + side])))
    if len(peaks):
        yield _placed(peaks, x, y, size)


def _placed(peaks: NDArray[np.int_], x: int, y: int, size: NDArray[np.int_]) -> Points:
    """Pixels of a crop to 0..1 of the picture; 0 says that a point was not found."""
    placed = np.where(peaks < 1, -1, peaks + np.array([x, y])) / size
    return [(float(across), float(down)) for across, down in placed]


def _finder(name: str, network: Any) -> Any:
    """An object of one of controlnet-aux's classes that finds points with ``network``; it holds no state."""
    module, _, kind = name.partition(".")
    part("open_pose.util")  # first: it and body import each other, which only works in this order
    finder = object.__new__(getattr(part(f"open_pose.{module}"), kind))
    finder.model = network
    return finder
