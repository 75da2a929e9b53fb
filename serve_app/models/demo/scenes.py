"""Scenes that the demo model is trained on: coloured shapes on coloured grounds, drawn from a seed.

A scene holds no pixels: it is rendered at any size, the same scene each time.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.models.demo.shapes import SHAPES, SYMMETRIC, TEXTURES, UPRIGHT, Part, placed
from serve_app.tasks import ImageArray

Rgb = tuple[int, int, int]

COLOURS: Mapping[str, Rgb] = {
    "red": (215, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 215, 50),
    "green": (50, 160, 70),
    "turquoise": (60, 200, 195),
    "blue": (45, 90, 210),
    "purple": (135, 60, 180),
    "pink": (245, 150, 190),
    "brown": (120, 75, 45),
    "black": (25, 25, 25),
    "grey": (130, 130, 130),
    "white": (240, 240, 240),
}
"""Name to sRGB; a scene's own colour differs from it by up to ``JITTER`` per channel."""

JITTER = 14
RADII: Mapping[int, tuple[float, float]] = {1: (0.2, 0.42), 2: (0.15, 0.25), 3: (0.12, 0.19)}
"""Items in a scene to the least and greatest radius, in shorter sides of the picture."""
_SHIFT = 4
"""OpenCV's polygons have corners at fractions of a pixel with this many bits."""
_TEXTURED = 0.25
_TRIES = 60


@dataclass(frozen=True, slots=True)
class Item:
    """One shape of a scene."""

    shape: str
    colour: str
    rgb: Rgb
    texture: str | None
    x: float
    y: float
    """Centre, in widths and heights of the picture."""
    radius: float
    """In shorter sides of the picture."""
    angle: float
    """Radians, clockwise."""
    period: float
    """Of the texture, in shorter sides of the picture."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in the picture, back to front."""

    ground: str
    ground_rgb: Rgb
    slope: float
    """The ground is this share lighter at the top and darker at the bottom; 0 is flat."""
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rendering:
    """A scene in pixels, with what its control maps are made of."""

    image: ImageArray
    """(H, W, 3) uint8."""
    owner: NDArray[np.uint8]
    """(H, W): 0 where the ground shows, else 1 + the index of the item."""


def sample_scene(random: np.random.Generator) -> Scene:
    """Draw a scene: one to three items that don't touch, none in the ground's colour."""
    names = list(COLOURS)
    ground = names[random.integers(len(names))]
    others = [name for name in names if name != ground]
    count = int(random.choice([1, 2, 3], p=[0.6, 0.28, 0.12]))
    items: list[Item] = []
    for _ in range(count):
        item = _sample_item(random, others, count, items)
        if item is not None:
            items.append(item)
    slope = float(random.uniform(-0.18, 0.18)) if random.random() < 0.5 else 0.0  # noqa: PLR2004  - a coin
    return Scene(ground, _jittered(random, ground), slope, tuple(items))


def render(scene: Scene, height: int, width: int) -> Rendering:
    """Draw ``scene`` with smooth edges."""
    side = min(height, width)
    shade = 1 + scene.slope * np.linspace(1, -1, height, dtype=np.float32)[:, None, None]
    image = np.broadcast_to(np.array(scene.ground_rgb, np.float32) * shade, (height, width, 3)).copy()
    owner = np.zeros((height, width), np.uint8)
    for index, item in enumerate(scene.items, start=1):
        for part in SHAPES[item.shape]:
            left, top, cover = _cover(part, item, height, width)
            window = (slice(top, top + cover.shape[0]), slice(left, left + cover.shape[1]))
            alpha = cover[:, :, None].astype(np.float32) / 255
            image[window] += alpha * (_fill(item, part, side, (top, left), cover.shape) - image[window])
            owner[window][cover > 127] = index  # noqa: PLR2004  - more than half covered
    return Rendering(image.clip(0, 255).round().astype(np.uint8), owner)


def toned(rgb: Rgb, tone: float) -> NDArray[np.float32]:
    """``rgb`` mixed with black (tone < 0) or white (tone > 0), (3,) in 0..255."""
    colour = np.array(rgb, np.float32)
    mixed: NDArray[np.float32] = colour + abs(tone) * ((255.0 if tone > 0 else 0.0) - colour)
    return mixed


def _sample_item(random: np.random.Generator, colours: list[str], count: int, before: list[Item]) -> Item | None:
    """An item clear of those before it, or None where no room was found."""
    shape = list(SHAPES)[random.integers(len(SHAPES))]
    colour = colours[random.integers(len(colours))]
    texture = list(TEXTURES)[random.integers(len(TEXTURES))] if random.random() < _TEXTURED else None
    least, greatest = RADII[count]
    turn = 0.0 if shape in SYMMETRIC else float(random.uniform(-1, 1)) * (0.12 if shape in UPRIGHT else 0.4)
    rgb, period = _jittered(random, colour), float(random.uniform(0.07, 0.11))
    for _ in range(_TRIES):
        radius = float(random.uniform(least, greatest))
        x, y = (float(each) for each in random.uniform(radius + 0.03, 0.97 - radius, size=2))
        if all(np.hypot(x - other.x, y - other.y) > radius + other.radius for other in before):
            return Item(shape, colour, rgb, texture, x, y, radius, turn, period)
    return None


def _jittered(random: np.random.Generator, name: str) -> Rgb:
    red, green, blue = (np.array(COLOURS[name]) + random.integers(-JITTER, JITTER + 1, size=3)).clip(0, 255).tolist()
    return red, green, blue


def _cover(part: Part, item: Item, height: int, width: int) -> tuple[int, int, ImageArray]:
    """Left and top of the window that a part lies in, and how much of each of its pixels is covered, (h, w) uint8."""
    radius = item.radius * min(height, width)
    # OpenCV counts from the centre of the first pixel.
    contours = [placed(contour, item.x * width, item.y * height, radius, item.angle) - 0.5 for contour in part.contours]
    corners = np.concatenate(contours)
    left, top = np.floor(corners.min(axis=0)).astype(int).clip(0, (width - 1, height - 1)).tolist()
    right, bottom = np.ceil(corners.max(axis=0) + 1).astype(int).clip((left + 1, top + 1), (width, height)).tolist()
    cover = np.zeros((bottom - top, right - left), np.uint8)
    polygons = [np.round((contour - (left, top)) * 2**_SHIFT).astype(np.int32) for contour in contours]
    cv2.fillPoly(cover, polygons, 255, cv2.LINE_AA, _SHIFT)
    return left, top, cover


def _fill(item: Item, part: Part, side: int, corner: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """(h, w, 3) or (3,): the part's colour, textured where it is the main part of a textured item."""
    colour = toned(item.rgb, part.tone)
    if item.texture is None or part.tone:
        return colour
    period = item.period * side
    y, x = np.mgrid[corner[0] : corner[0] + shape[0], corner[1] : corner[1] + shape[1]].astype(np.float64)
    cos, sin = np.cos(item.angle + np.pi / 4), np.sin(item.angle + np.pi / 4)
    second = TEXTURES[item.texture]((x * cos + y * sin) / period, (y * cos - x * sin) / period)
    light = float(np.mean(colour)) > 150  # noqa: PLR2004  - light colours take a darker pattern, dark ones a lighter
    filled: NDArray[np.float32] = np.where(second[:, :, None], toned(item.rgb, -0.4 if light else 0.5), colour)
    return filled
