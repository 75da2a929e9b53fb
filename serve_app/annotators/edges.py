"""Line drawings from photos, white on black, by arithmetic alone: no weights."""

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap

_FULL = 255


def canny(source: Source) -> ControlMap:
    """OpenCV's Canny on all three channels, with the thresholds the ControlNets were trained with as defaults."""
    return _grey_to_rgb(cv2.Canny(source.image, source.params["low_threshold"], source.params["high_threshold"]))


def xdog(source: Source) -> ControlMap:
    """Bold strokes: a thresholded difference of Gaussians.

    After Winnemoeller, Kyprianidis, Olsen: XDoG, Computers & Graphics 36 (2012), section 2, in the two-level form that
    scribble ControlNets are commonly fed: radii 0.5 and 5 pixels, each pixel judged by the channel that darkens least.
    """
    pixels = source.image.astype(np.float32)
    difference = _blurred(pixels, 5.0) - _blurred(pixels, 0.5)
    strokes = 2 * difference.min(axis=2) > source.params["threshold"]
    return _grey_to_rgb(np.where(strokes, _FULL, 0).astype(np.uint8))


def lineart_standard(source: Source) -> ControlMap:
    """Soft lines: how much darker than its surroundings a pixel is, brightened so that the typical line is mid grey.

    The formula of LineartStandard in controlnet-aux 0.0.10: min over channels of (blur - pixel), divided by the
    median of what exceeds the threshold (at least 16), times 127.
    """
    pixels = source.image.astype(np.float32)
    darkness = (_blurred(pixels, source.params["sigma"]) - pixels).min(axis=2).clip(0, _FULL)
    lines = darkness[darkness > source.params["threshold"]]
    typical = max(16.0, float(np.median(lines))) if lines.size else 16.0
    return _grey_to_rgb((darkness / typical * 127).clip(0, _FULL).astype(np.uint8))


def _blurred(pixels: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    blurred: NDArray[np.float32] = cv2.GaussianBlur(pixels, (0, 0), sigma)
    return blurred


def _grey_to_rgb(grey: NDArray[np.uint8]) -> ControlMap:
    return np.repeat(grey[:, :, None], 3, axis=2)
