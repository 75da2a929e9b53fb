"""Between the output's pixels and a network's: at which size a network looks, and how its map comes back exactly.

Networks want sides that are multiples of their stride. Either the picture is continued beyond its right and lower
border, which moves no pixel, and the map is cut; or, for networks that see the whole picture at once (depth), it is
resized to the nearest multiple and the map is resized back.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from serve_app.annotators.source import Source
from serve_app.images import resize_image, resize_map
from serve_app.tasks import ControlMap, ImageArray

_SHORTEST = 32
"""The most that a network here halves a picture by, but for one that gets it padded to 256."""
LARGEST_AREA = 1536 * 1024
"""Pixels that a network sees at most where a resolution is chosen: time and memory grow with them."""


@dataclass(frozen=True, slots=True)
class View:
    """The picture as a network sees it."""

    pixels: Tensor
    """(1, 3, h, w) float32 in 0..255, RGB, on the network's device; sides are multiples of its stride."""
    height: int
    width: int
    """How much of ``pixels`` is picture; the rest continues it."""
    out_height: int
    out_width: int

    def grey(self, levels: NDArray[np.floating], *, lines: bool = False) -> ControlMap:
        """A control map from (h, w) levels in 0..1."""
        return self.colour(np.repeat(levels[:, :, None], 3, axis=2), lines=lines)

    def colour(self, levels: NDArray[np.floating], *, lines: bool = False) -> ControlMap:
        """A control map from (h, w, 3) levels in 0..1. ``lines``: resized without blur."""
        bytes_ = (self.cut(levels) * 255).clip(0, 255).astype(np.uint8)
        return resize_map(bytes_, self.out_width, self.out_height, lines=lines)

    def cut(self, values: NDArray[np.floating]) -> NDArray[np.floating]:
        return values[: self.height, : self.width]


def look(source: Source, network: nn.Module, multiple: int, *, fit: bool = False) -> View:
    """``fit``: resize to the nearest multiples instead of continuing the picture."""
    out_height, out_width = source.image.shape[:2]
    image = at_resolution(source)
    height, width = image.shape[:2]
    if fit:
        height, width = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
        image = resize_image(image, width, height)
    else:
        image = cv2.copyMakeBorder(image, 0, -height % multiple, 0, -width % multiple, cv2.BORDER_REFLECT_101)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(next(network.parameters()).device)
    return View(pixels.float()[None], height, width, out_height, out_width)


def at_resolution(source: Source) -> ImageArray:
    """The picture, its short side brought to the parameter ``resolution``; 0 leaves it at the output's own size.

    Its area stays within four times the square of that and within ``LARGEST_AREA``, so that long strips don't grow
    without bound, but no side gets shorter than 32 pixels by it, for some networks fail on less.
    """
    height, width = source.image.shape[:2]
    resolution = int(source.params["resolution"])
    if resolution == 0:
        return source.image
    short = min(height, width)
    area = min(4 * resolution**2, LARGEST_AREA)
    scale = min(resolution / short, max(math.sqrt(area / (height * width)), _SHORTEST / short))
    return resize_image(source.image, round(width * scale), round(height * scale))


def normalised(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Pixels in 0..255 to the statistics a network was trained with, given for 0..1."""
    shape = (1, 3, 1, 1)
    return (pixels / 255 - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels, RGB."""


def stretched(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.floating]:
    """Linear, ``low`` to 0 and ``high`` to 1; all 0 where both are the same, as for a blank picture."""
    if not high - low > np.finfo(np.float32).eps:
        return np.zeros_like(values)
    return (values - low) / (high - low)
