"""Control maps for training: by the project's own annotators where a request would be annotated so, by the scene's
geometry where it would bring its own map.

Every maker takes a rendered scene and gives what a ControlNet sees, (H, W, 3): uint8, or float32 for inpaint.
"""

from collections.abc import Callable, Mapping

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.annotators.edges import canny, lineart_standard, xdog
from serve_app.annotators.pictures import inpaint, shuffle
from serve_app.annotators.source import Source
from serve_app.models.demo.scenes import Rendering, Scene
from serve_app.models.demo.shapes import SHAPES
from serve_app.tasks import ControlMap, ImageArray

Maker = Callable[[Scene, Rendering, np.random.Generator], ControlMap]

GROUND_COLOUR = (120, 120, 120)
"""Of the ground in segmentation maps."""


def class_colours() -> Mapping[str, tuple[int, int, int]]:
    """Colour of each shape in segmentation maps: hues around the circle, in the order of SHAPES, by turns dark."""
    colours = {}
    for index, shape in enumerate(SHAPES):
        hue, value = round(180 * index / len(SHAPES)), 255 if index % 2 == 0 else 150
        red, green, blue = cv2.cvtColor(np.array([[[hue, 220, value]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0].tolist()
        colours[shape] = (red, green, blue)
    return colours


CLASS_COLOURS = class_colours()


def make_canny(_: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    low = float(random.integers(40, 121))
    return canny(_source(rendering, low_threshold=low, high_threshold=2 * low))


def make_scribble(scene: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    """The annotator's strokes where it finds any, or outlines as by a hand: thick, and a few pixels off."""
    strokes = xdog(_source(rendering, threshold=float(random.integers(16, 49))))
    if random.random() < 0.5 and strokes.any():  # noqa: PLR2004  - a coin
        return strokes
    height, width = rendering.owner.shape
    owner = _wobbled(rendering.owner, 0.008 * min(height, width), random)
    return _grey(_outlines(owner, len(scene.items), int(random.integers(3, 8)) * min(height, width) // 384 + 1))


def make_lineart(scene: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    """The annotator's soft lines where it finds any, or thin even ones."""
    lines = lineart_standard(_source(rendering, sigma=float(random.uniform(4, 8)), threshold=8.0))
    if random.random() < 0.5 and lines.any():  # noqa: PLR2004  - a coin
        return lines
    return _grey(_outlines(rendering.owner, len(scene.items), int(random.integers(1, 4))))


def make_segmentation(scene: Scene, rendering: Rendering, _: np.random.Generator) -> ControlMap:
    colours = np.array([GROUND_COLOUR, *(CLASS_COLOURS[item.shape] for item in scene.items)], np.uint8)
    drawn: ControlMap = colours[rendering.owner]
    return drawn


def make_depth(scene: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    """Near is bright, as the depth annotators draw it: shapes are flat and stand on ground that recedes upwards."""
    height, width = rendering.owner.shape
    far, near = sorted(random.uniform(0, 90, size=2))
    ground = np.broadcast_to(np.linspace(far, near, height)[:, None], (height, width))
    levels = np.array([0.0, *random.uniform(120, 255, size=len(scene.items))])
    depth = np.where(rendering.owner > 0, levels[rendering.owner], ground)
    return _grey(depth.round().astype(np.uint8))


def make_inpaint(_: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    """A box or an ellipse to repaint, from a sixth of the picture's sides to all of them."""
    height, width = rendering.owner.shape
    mask = np.zeros((height, width), np.uint8)
    half_width, half_height = random.uniform(0.08, 0.5, size=2) * (width, height)
    x, y = random.uniform(0.1, 0.9, size=2) * (width, height)
    if random.random() < 0.5:  # noqa: PLR2004  - a coin
        corners = ((round(x - half_width), round(y - half_height)), (round(x + half_width), round(y + half_height)))
        cv2.rectangle(mask, *corners, 255, cv2.FILLED)
    else:
        cv2.ellipse(mask, (round(x), round(y)), (round(half_width), round(half_height)), 0, 0, 360, 255, cv2.FILLED)
    return inpaint(_source(rendering, mask=mask))


def make_tile(_: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    """The picture, from as it is to a sixteenth of its size enlarged again."""
    height, width = rendering.owner.shape
    factor = int(random.choice([1, 4, 8, 16]))
    small = cv2.resize(rendering.image, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    drawn: ControlMap = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return drawn


def make_shuffle(_: Scene, rendering: Rendering, random: np.random.Generator) -> ControlMap:
    return shuffle(_source(rendering, seed=int(random.integers(2**31)), scale=min(rendering.owner.shape) / 2))


MAKERS: Mapping[str, Maker] = {
    "canny": make_canny,
    "scribble": make_scribble,
    "lineart": make_lineart,
    "segmentation": make_segmentation,
    "depth": make_depth,
    "inpaint": make_inpaint,
    "tile": make_tile,
    "shuffle": make_shuffle,
}
"""Control type to maker; the order in which the nets are trained."""


def as_hint(drawn: ControlMap) -> Tensor:
    """(H, W, 3) to (1, 3, H, W), as the engine does it: uint8 becomes 0..1, float32 stays."""
    values = drawn.astype(np.float32) / 255 if drawn.dtype == np.uint8 else drawn
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]


def _source(rendering: Rendering, mask: ImageArray | None = None, seed: int = 0, **params: float) -> Source:
    return Source(image=rendering.image, mask=mask, seed=seed, params=params)


def _outlines(owner: NDArray[np.uint8], count: int, thickness: int) -> ImageArray:
    """(H, W): white smooth lines around each item."""
    lines = np.zeros_like(owner)
    for index in range(1, count + 1):
        contours, _ = cv2.findContours((owner == index).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(lines, contours, -1, 255, thickness, cv2.LINE_AA)
    return lines


def _wobbled(owner: NDArray[np.uint8], amplitude: float, random: np.random.Generator) -> NDArray[np.uint8]:
    """``owner`` with every pixel taken from up to ``amplitude`` pixels away, smoothly over the picture."""
    height, width = owner.shape
    shifts = random.uniform(-amplitude, amplitude, size=(2, 12, 12)).astype(np.float32)
    dy, dx = (cv2.resize(shift, (width, height), interpolation=cv2.INTER_CUBIC) for shift in shifts)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    drawn: NDArray[np.uint8] = cv2.remap(owner, x + dx, y + dy, cv2.INTER_NEAREST)
    return drawn


def _grey(values: ImageArray) -> ControlMap:
    return np.repeat(values[:, :, None], 3, axis=2)
