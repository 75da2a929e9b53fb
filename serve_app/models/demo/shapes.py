"""The outlines that the demo model knows how to draw, in unit coordinates: x to the right, y down, both -1..1.

A shape is a list of parts, painted in order. It knows nothing of colours beyond light and dark, nor of pixels.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Contour = NDArray[np.float64]
"""(points, 2): a closed polygon of x, y."""

CURVE_POINTS = 64
"""Corners of a full circle: at radius 200 the polygon is within a quarter of a pixel of it."""


class Part(NamedTuple):
    """One closed region of one tone. Contours inside contours are holes."""

    contours: tuple[Contour, ...]
    tone: float = 0.0
    """0: the colour that the caption names; towards -1 it is mixed with black, towards 1 with white."""


def _points(*points: tuple[float, float]) -> Contour:
    return np.array(points, dtype=np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float) -> Contour:
    angles = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def _regular(corners: int, radius: float = 1.0, turn: float = -np.pi / 2) -> Contour:
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _box(left: float, top: float, right: float, bottom: float) -> Contour:
    return _points((left, top), (right, top), (right, bottom), (left, bottom))


def _star() -> Contour:
    corners = np.empty((10, 2))
    corners[::2], corners[1::2] = _regular(5), _regular(5, 0.42, np.pi / 5 - np.pi / 2)
    return corners


def _heart() -> Contour:
    """The curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, brought to the unit square."""
    t = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -(y + 2.5) / 15], axis=1)


def _moon() -> Contour:
    """A disc of radius 1 less a disc of radius 0.85 whose centre is 0.55 to the right."""
    distance, inner = 0.55, 0.85
    x = (1 - inner**2 + distance**2) / (2 * distance)
    outer_angle, inner_angle = np.arccos(x), np.arccos((x - distance) / inner)
    out = np.linspace(outer_angle, 2 * np.pi - outer_angle, CURVE_POINTS)
    back = np.linspace(2 * np.pi - inner_angle, inner_angle, CURVE_POINTS)
    return np.concatenate(
        [
            np.stack([np.cos(out), np.sin(out)], axis=1),
            np.stack([distance + inner * np.cos(back), inner * np.sin(back)], axis=1),
        ]
    )


def _cross() -> Contour:
    a = 0.33
    return _points(
        (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)
    )  # fmt: skip


def _petals() -> Contour:
    angles = np.linspace(0, 2 * np.pi, 3 * CURVE_POINTS, endpoint=False)
    radius = 0.72 + 0.28 * np.cos(6 * angles)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1)


def _crown() -> Contour:
    angles = np.linspace(0, 2 * np.pi, 3 * CURVE_POINTS, endpoint=False)
    radius = 0.66 + 0.06 * np.cos(7 * angles)
    return np.stack([radius * np.sin(angles), -0.34 - radius * np.cos(angles)], axis=1)


SHAPES: Mapping[str, tuple[Part, ...]] = {
    "circle": (Part((_ellipse(0, 0, 1, 1),)),),
    "square": (Part((_box(-0.85, -0.85, 0.85, 0.85),)),),
    "triangle": (Part((_points((0, -0.95), (1, 0.8), (-1, 0.8)),)),),
    "star": (Part((_star(),)),),
    "heart": (Part((_heart(),)),),
    "diamond": (Part((_points((0, -1), (0.68, 0), (0, 1), (-0.68, 0)),)),),
    "ring": (Part((_ellipse(0, 0, 1, 1), _ellipse(0, 0, 0.55, 0.55))),),
    "cross": (Part((_cross(),)),),
    "moon": (Part((_moon(),)),),
    "hexagon": (Part((_regular(6),)),),
    "house": (
        Part((_box(-0.75, -0.15, 0.75, 0.95),)),
        Part((_points((-1, -0.1), (0, -1), (1, -0.1)),), -0.5),
        Part((_box(-0.18, 0.35, 0.18, 0.95),), -0.5),
        Part((_box(0.32, 0.15, 0.6, 0.43), _box(-0.6, 0.15, -0.32, 0.43)), 0.65),
    ),
    "tree": (Part((_box(-0.14, 0.2, 0.14, 1),), -0.65), Part((_crown(),))),
    "flower": (Part((_petals(),)), Part((_ellipse(0, 0, 0.3, 0.3),), -0.6)),
    "fish": (
        Part((_points((0.45, 0), (1, -0.55), (1, 0.55)),), -0.35),
        Part((_ellipse(-0.2, 0, 0.8, 0.5),)),
        Part((_ellipse(-0.62, -0.1, 0.09, 0.09),), -0.85),
    ),
    "boat": (
        Part((_points((-1, 0.35), (1, 0.35), (0.65, 0.9), (-0.65, 0.9)),)),
        Part((_box(-0.05, -0.95, 0.05, 0.35),), -0.6),
        Part((_points((0.1, -0.9), (0.85, 0.2), (0.1, 0.2)),), 0.6),
    ),
    "car": (
        Part((_points((-0.55, -0.1), (-0.35, -0.55), (0.35, -0.55), (0.6, -0.1)),), 0.6),
        Part((_points((-1, -0.1), (0.85, -0.1), (1, 0.05), (1, 0.4), (-1, 0.4)),)),
        Part((_ellipse(-0.55, 0.42, 0.24, 0.24),), -0.85),
        Part((_ellipse(0.55, 0.42, 0.24, 0.24),), -0.85),
    ),
}
"""Name, as captions say it, to parts. The order is that of the classes in segmentation maps."""

SYMMETRIC: frozenset[str] = frozenset({"circle", "ring"})
UPRIGHT: frozenset[str] = frozenset({"house", "tree", "fish", "boat", "car"})
"""Turned by a few degrees at most."""


def placed(contour: Contour, x: float, y: float, radius: float, angle: float) -> Contour:
    """Turned by ``angle`` (radians, clockwise), scaled by ``radius`` and moved to ``x``, ``y``."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    moved: Contour = radius * contour @ turn + np.array([x, y])
    return moved


Texture = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]
"""Coordinates across and along, in periods, to where the second tone goes."""


def _dots(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.3**2
    return inside


def _stripes(u: NDArray[np.float64], _: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = u % 1 < 0.5  # noqa: PLR2004  - half and half
    return inside


def _checks(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = (np.floor(2 * u) + np.floor(2 * v)) % 2 == 0
    return inside


TEXTURES: Mapping[str, Texture] = {"striped": _stripes, "dotted": _dots, "checkered": _checks}
"""Adjective, as captions say it, to the pattern. Items without one are filled flat."""
