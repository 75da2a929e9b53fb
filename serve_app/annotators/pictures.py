"""Control maps that are pictures themselves: shuffled, tiled, or with a hole to repaint."""

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.annotators.source import Source
from serve_app.errors import JobError
from serve_app.tasks import ControlMap

_MASKED_FROM = 128
"""One half of 255, rounded up: where the engine cuts its mask."""


def tile(source: Source) -> ControlMap:
    """The picture at the output's size."""
    return source.image


def invert(source: Source) -> ControlMap:
    """The picture in negative: a drawing in black on white becomes lines in white on black."""
    return 255 - source.image


def shuffle(source: Source) -> ControlMap:
    """The picture folded at random, so that its colours and textures guide and its layout does not.

    Two smooth random fields in 0..1 say which column and row each pixel is taken from, as in the annotator that the
    shuffle ControlNet was trained with. The numbers come from ``source.seed`` alone.
    """
    height, width = source.image.shape[:2]
    scale = int(source.params["scale"])
    random = np.random.default_rng(source.seed)
    columns = _smooth_noise(random, height, width, scale) * (width - 1)
    rows = _smooth_noise(random, height, width, scale) * (height - 1)
    shuffled: NDArray[np.uint8] = cv2.remap(source.image, columns, rows, cv2.INTER_LINEAR)
    return shuffled


def _smooth_noise(random: np.random.Generator, height: int, width: int, scale: int) -> NDArray[np.float32]:
    """(H, W) float32 from exactly 0 to exactly 1, with folds about ``scale`` pixels wide.

    Drawn on a coarse grid and enlarged with a margin of one fold, so that the border looks like the middle.
    """
    grid = random.random((height // scale + 2, width // scale + 2), dtype=np.float32)
    field = cv2.resize(grid, (width + 2 * scale, height + 2 * scale), interpolation=cv2.INTER_CUBIC)
    field = field[scale : scale + height, scale : scale + width]
    field -= field.min()
    noise: NDArray[np.float32] = field / max(float(field.max()), 1e-6)
    return noise


def inpaint(source: Source) -> ControlMap:
    """(H, W, 3) float32: the picture in 0..1, -1 where the mask says repaint.

    The mask is resized and cut as the engine does with its own: both mean the same pixels.

    Raises:
        JobError: there is no mask.
    """
    if source.mask is None:
        raise JobError("The control type inpaint needs a mask_image.")
    control_map = source.image.astype(np.float32) / 255
    control_map[source.mask >= _MASKED_FROM] = -1
    return control_map
