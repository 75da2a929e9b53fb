"""Depth, near is white, and surface normals."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from serve_app.annotators.geometry import IMAGENET, View, look, normalised, stretched
from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_ZOE_MARGIN = 3
"""Margin in units of sqrt(side / 2), which is then cut: the network is unreliable at the border."""


def depth_anything(source: Source) -> ControlMap:
    """Depth Anything V2 (Yang et al., 2024): inverse depth, stretched from its minimum to its maximum."""
    network = source.networks["depth_anything_v2"]
    view = look(source, network, network.config.patch_size, fit=True)
    return _near_is_white(view, network(normalised(view.pixels, *IMAGENET)).predicted_depth)


def midas(source: Source) -> ControlMap:
    """MiDaS 3 DPT-Hybrid (Ranftl et al., 2021): inverse depth, stretched from its minimum to its maximum."""
    network = source.networks["midas"]
    view = look(source, network, 32, fit=True)
    return _near_is_white(view, midas_depth(network, normalised(view.pixels, *_HALF)))


def midas_depth(network: Any, pixels: Tensor) -> Tensor:
    """(1, h, w) inverse depth from (1, 3, h, w): ``DPTForDepthEstimation.forward``, which takes pictures for square.

    ``network`` is a hybrid: of the four feature maps the first two come from its convolutions.
    """
    outputs = network.dpt(pixels, output_hidden_states=True)
    late = set(network.config.backbone_out_indices[2:])
    states = [state for index, state in enumerate(outputs.hidden_states[1:]) if index in late]
    patches = [side // network.config.patch_size for side in pixels.shape[2:]]
    depth: Tensor = network.head(network.neck([*outputs.intermediate_activations, *states], *patches))
    return depth


def zoe(source: Source) -> ControlMap:
    """ZoeDepth NYU (Bhat et al., 2023): depth from its 2nd to its 85th percentile, inverted, as ControlNet had it."""
    network = source.networks["zoe"]
    view = look(source, network, 1)
    depth = zoe_metres(network, view.pixels)[0, 0].cpu().numpy()
    near, far = np.percentile(depth, (2, 85))
    blank = not far - near > np.finfo(np.float32).eps
    return view.grey(np.zeros_like(depth) if blank else 1 - stretched(depth, near, far))


def zoe_metres(network: Any, pixels: Tensor) -> Tensor:
    """(1, 1, h, w) metres from (1, 3, h, w) pixels: with margins, and averaged with the mirrored picture's.

    What ``ZoeDepthImageProcessor`` of transformers does before and after. The network looks at pictures about as large
    as those it was trained with, 4 to 3 and as high as its backbone's: 384 x 512.
    """
    side = network.config.backbone_config.image_size
    trained = (side, side * 4 // 3)
    height, width = pixels.shape[2:]
    rows, columns = (int(math.sqrt(one / 2) * _ZOE_MARGIN) for one in (height, width))
    padded = pad(pixels, (columns, columns, rows, rows), mode="reflect")
    full = padded.shape[2:]
    scale = min((wanted / one for wanted, one in zip(trained, full, strict=True)), key=lambda one: abs(1 - one))
    size = [max(32, round(one * scale / 32) * 32) for one in full]
    small = normalised(interpolate(padded, size, mode="bilinear", align_corners=True), *_HALF)
    both: Tensor = network(torch.cat([small, small.flip(3)])).predicted_depth
    depth = (both[:1] + both[1:].flip(2)) / 2
    large = interpolate(depth[None], full, mode="bicubic", align_corners=False)
    return large[:, :, rows : rows + height, columns : columns + width]


def leres(source: Source) -> ControlMap:
    """LeReS (Yin et al., 2021): relative depth, stretched, inverted; what is nearer or farther than asked is cut.

    The network gets RGB in 0..1, normalised, as in its own repository. controlnet-aux hands it BGR in 0..255.
    """
    network = source.networks["leres"]
    view = look(source, network, 32, fit=True)
    depth = network(normalised(view.pixels, *IMAGENET))[0, 0].cpu().numpy()
    far = stretched(depth, depth.min(), depth.max())
    near_limit, far_limit = source.params["remove_near"] / 100, source.params["remove_background"] / 100
    near = np.where(far > near_limit, 1 - far, 1) if near_limit else 1 - far
    return view.grey(np.where(near > far_limit, near, 0) if far_limit else near)


def normal_bae(source: Source) -> ControlMap:
    """Surface normals (Bae, Budvytis, Cipolla, 2021), -1..1 to 0..255: x right, y up, z out of the picture."""
    network = source.networks["normal_bae"]
    view = look(source, network, 32)
    normals = network(normalised(view.pixels, *IMAGENET))[0][-1][0, :3]
    return view.colour(((normals + 1) / 2).permute(1, 2, 0).cpu().numpy())


def _near_is_white(view: View, inverse_depth: Tensor) -> ControlMap:
    values: NDArray[np.float32] = inverse_depth[0].cpu().numpy()
    return view.grey(stretched(values, values.min(), values.max()))
