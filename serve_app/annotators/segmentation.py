"""What each pixel belongs to, painted in the colours of ADE20K's 150 classes."""

import cv2
import numpy as np

from serve_app.annotators.geometry import IMAGENET, look, normalised
from serve_app.annotators.isolation import part
from serve_app.annotators.source import Source
from serve_app.errors import ModelLoadFailed
from serve_app.tasks import ControlMap


def upernet(source: Source) -> ControlMap:
    """UperNet (Xiao et al., 2018). Labels are resized, not colours: no pixel gets a colour between two classes.

    Raises:
        ModelLoadFailed: the weights know more classes than there are colours.
    """
    network = source.networks["upernet"]
    view = look(source, network, 32)
    logits = network(normalised(view.pixels, *IMAGENET)).logits
    palette = np.array(part("util").ade_palette(), np.uint8)
    if logits.shape[1] > len(palette):
        raise ModelLoadFailed(f"The segmentation weights know {logits.shape[1]} classes, ADE20K has {len(palette)}.")
    labels = view.cut(logits[0].argmax(0).cpu().numpy().astype(np.uint8))
    return palette[cv2.resize(labels, (view.out_width, view.out_height), interpolation=cv2.INTER_NEAREST_EXACT)]
