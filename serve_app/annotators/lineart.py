"""Line drawings from networks, white on black: realistic, coarse and anime line art, and straight lines (M-LSD)."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import max_pool2d

from serve_app.annotators.geometry import look
from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap

_CENTRES = 200
"""Line centres looked at, the strongest first."""


def realistic(source: Source) -> ControlMap:
    """Informative drawings (Chan, Durand, Isola, 2022)."""
    return _drawing(source, "lineart")


def coarse(source: Source) -> ControlMap:
    """The same with the weights that were trained on simpler drawings."""
    return _drawing(source, "lineart_coarse")


def anime(source: Source) -> ControlMap:
    """Anime2Sketch (Mukosame, 2021); its U-Net halves the picture 8 times."""
    network = source.networks["lineart_anime"]
    view = look(source, network, 256)
    ink = 1 - network(view.pixels / 127.5 - 1)[0, 0].cpu().numpy()
    return view.grey(ink / 2, lines=True)


def _drawing(source: Source, name: str) -> ControlMap:
    network = source.networks[name]
    view = look(source, network, 4)
    return view.grey(1 - network(view.pixels / 255)[0, 0].cpu().numpy(), lines=True)


def mlsd(source: Source) -> ControlMap:
    """Straight lines (Gu et al.: Towards Light-weight and Real-time Line Segment Detection, 2022), one pixel wide.

    Drawn at the output's size from the lines' ends, not resized.
    """
    network = source.networks["mlsd"]
    view = look(source, network, 32)
    image = torch.cat([view.pixels, torch.ones_like(view.pixels[:, :1])], dim=1) / 127.5 - 1
    lines = segments(network(image), source.params["value_threshold"], source.params["distance_threshold"])
    scale = np.array([view.out_width / view.width, view.out_height / view.height])
    drawing = np.zeros((view.out_height, view.out_width), np.uint8)
    for start, end in (lines.reshape(-1, 2, 2) * scale).astype(int).tolist():
        cv2.line(drawing, start, end, 255, 1)
    return np.repeat(drawing[:, :, None], 3, axis=2)


def segments(output: Tensor, value_threshold: float, distance_threshold: float) -> NDArray[np.float32]:
    """Ends of the lines, (n, 4) as x, y, x, y in pixels of the input, from M-LSD's output (1, 9, h/2, w/2).

    ``pred_lines`` of controlnet-aux 0.0.10: centres are maxima of a 3 x 3 window, sigmoid above ``value_threshold``;
    channels 1 to 4 lead from there to both ends; lines not longer than ``distance_threshold`` (half pixels) are left
    out. No line is an empty array there and here, but an error in the code around it there.
    """
    heat = output[0, 0].sigmoid()
    peaks = torch.where(max_pool2d(heat[None], 3, stride=1, padding=1)[0] == heat, heat, 0).flatten()
    scores, places = peaks.topk(min(_CENTRES, peaks.numel()))
    x, y = places % heat.shape[1], places // heat.shape[1]
    ends = output[0, 1:5, y, x].T  # (n, 4): from the centre to both ends
    far = (ends[:, :2] - ends[:, 2:]).norm(dim=1) > distance_threshold
    lines = (torch.stack([x, y, x, y], dim=1) + ends)[(scores > value_threshold) & far]
    doubled: NDArray[np.float32] = (lines * 2).cpu().numpy()
    return doubled
