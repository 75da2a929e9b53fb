"""Final latents to pixels, one picture at a time.

The engine decodes at most one picture between two steps: a decode costs as much as a few rows of a step, so a burst
of finished pictures delays the running batch by one of them per step and not by all at once.
"""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.vae import decode_latent
from serve_app.errors import JobError
from serve_app.models.components import BaseComponents
from serve_app.tasks import ImageArray


def decode(base: BaseComponents, latent: Tensor) -> ImageArray:
    """(1, 4, h, w) latent -> (H, W, 3) uint8.

    Raises:
        JobError: the latent or the picture holds NaN or infinity.
    """
    pixels = decode_latent(base, latent)
    # NaN would be stored as a black picture. A VAE in half precision can overflow on a sound latent, too.
    if not torch.isfinite(pixels).all():
        raise JobError(f"The model {base.id!r} gave numbers that are not finite; try other settings.")
    unit = (pixels[0] * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0).float().cpu().numpy()
    return (unit * 255).round().astype(np.uint8)
