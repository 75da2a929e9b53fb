"""Drawing people as OpenPose's ControlNets were taught: limbs, hands and faces from key points. No network here.

Pixel for pixel what the drawing functions of controlnet-aux 0.0.10 draw, without matplotlib, and for hands that lack
points too. Key points are (x, y) in 0..1 of the picture; None where one was not found.
"""

import colorsys
import math
from collections.abc import Sequence

import cv2
import numpy as np

from serve_app.tasks import ControlMap

Point = tuple[float, float]
Points = Sequence[Point | None]
"""18 body points in the order of COCO with a neck, 21 of a hand, up to 71 of a face."""

_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_COLOURS = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
_FINGERS = tuple((0 if joint % 4 == 1 else joint - 1, joint) for joint in range(1, 21))
_DIMMED = 0.6
"""Limbs are darker than the joints that lie on them."""


def draw_body(canvas: ControlMap, points: Points) -> None:
    """Draw limbs as ellipses 8 pixels wide and joints as discs of radius 4, in place."""
    height, width = canvas.shape[:2]
    for (start, end), colour in zip(_LIMBS, _COLOURS, strict=False):  # the last joint starts no limb
        first, second = points[start], points[end]
        if first is None or second is None:
            continue
        across, down = (first[0] - second[0]) * width, (first[1] - second[1]) * height
        middle = (int((first[0] + second[0]) / 2 * width), int((first[1] + second[1]) / 2 * height))
        angle = int(math.degrees(math.atan2(down, across)))
        limb = cv2.ellipse2Poly(middle, (int(math.hypot(across, down) / 2), 4), angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, limb, [int(level * _DIMMED) for level in colour])
    for point, colour in zip(points, _COLOURS, strict=True):
        if point is not None:
            cv2.circle(canvas, _pixel(point, width, height), 4, colour, thickness=-1)


def draw_hand(canvas: ControlMap, points: Points) -> None:
    """Draw finger bones in a rainbow, 2 pixels wide, and joints as blue discs of radius 4, in place."""
    height, width = canvas.shape[:2]
    for index, (start, end) in enumerate(_FINGERS):
        first, second = points[start], points[end]
        if first is None or second is None:
            continue
        ends = _pixel(first, width, height), _pixel(second, width, height)
        if all(_inside(pixel) for pixel in ends):
            colour = [level * 255 for level in colorsys.hsv_to_rgb(index / len(_FINGERS), 1.0, 1.0)]
            cv2.line(canvas, *ends, colour, thickness=2)
    _draw_dots(canvas, points, 4, (0, 0, 255))


def draw_face(canvas: ControlMap, points: Points) -> None:
    """Draw points as white discs of radius 3, in place."""
    _draw_dots(canvas, points, 3, (255, 255, 255))


def _draw_dots(canvas: ControlMap, points: Points, radius: int, colour: tuple[int, int, int]) -> None:
    height, width = canvas.shape[:2]
    for point in points:
        if point is not None and _inside(pixel := _pixel(point, width, height)):
            cv2.circle(canvas, pixel, radius, colour, thickness=-1)


def _pixel(point: Point, width: int, height: int) -> tuple[int, int]:
    return int(point[0] * width), int(point[1] * height)


def _inside(pixel: tuple[int, int]) -> bool:
    """Hands and faces mark a point that was not found with a place left of or above the picture."""
    return pixel[0] > 0 and pixel[1] > 0


def blank(height: int, width: int) -> ControlMap:
    return np.zeros((height, width, 3), np.uint8)
