"""Soft edges from networks, HED and PiDiNet, and the scribbles that are made of them."""

import cv2
import numpy as np
from numpy.typing import NDArray

from serve_app.annotators.geometry import look
from serve_app.annotators.isolation import part
from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap

_FULL = 255


def hed(source: Source) -> ControlMap:
    """HED (Xie, Tu: Holistically-Nested Edge Detection, 2015) in the Apache-licensed form that ControlNet trained with.

    Five side outputs, enlarged and averaged before the sigmoid, as in controlnet-aux 0.0.10.
    """
    network = source.networks["hed"]
    view = look(source, network, 16)
    size = (view.pixels.shape[3], view.pixels.shape[2])
    sides = [side[0, 0].cpu().numpy() for side in network(view.pixels)]
    mean = np.mean([cv2.resize(side, size, interpolation=cv2.INTER_LINEAR) for side in sides], axis=0)
    edges = 1 / (1 + np.exp(-mean.astype(np.float64)))
    return view.grey(_stepped(edges) if source.params["safe"] else edges, lines=True)


def pidinet(source: Source) -> ControlMap:
    """PiDiNet (Su et al.: Pixel Difference Networks for Efficient Edge Detection, 2021), fused output; wants BGR."""
    network = source.networks["pidinet"]
    view = look(source, network, 8)
    edges = network(view.pixels.flip(1) / _FULL)[-1][0, 0].cpu().numpy()
    return view.grey(_stepped(edges) if source.params["safe"] else edges, lines=True)


def scribble_hed(source: Source) -> ControlMap:
    return _strokes(hed(source))


def scribble_pidinet(source: Source) -> ControlMap:
    return _strokes(pidinet(source))


def _stepped(edges: NDArray[np.floating]) -> NDArray[np.floating]:
    """Three levels instead of many: hides in the edges what a picture could be recovered from (``safe_step``)."""
    return np.floor(edges.astype(np.float32) * 3) / 2


def _strokes(edges: ControlMap) -> ControlMap:
    """Thinned edges drawn bold, black and white: controlnet-aux's ``nms`` at half level and sigma 3, then widened."""
    thin: NDArray[np.uint8] = part("util").nms(edges[:, :, 0], 127, 3.0)
    bold = cv2.GaussianBlur(thin, (0, 0), 3.0) > 4  # noqa: PLR2004  - as in controlnet-aux
    return np.repeat(np.where(bold, _FULL, 0).astype(np.uint8)[:, :, None], 3, axis=2)
