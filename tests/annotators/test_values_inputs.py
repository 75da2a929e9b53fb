"""What each network is shown: the channels, their order and their range are those it was trained with.

The detectors of controlnet-aux, or the processors of transformers, show the same picture to the same network.
"""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import transformers
from torch import Tensor

from serve_app.annotators import depth, lineart, pose, segmentation, softedge
from serve_app.annotators.source import Annotator, Source
from serve_app.images import resize_image
from support.detectors import Looking, reference_library

TRANSFORMS: Any = importlib.import_module("torchvision.transforms")  # untyped
PHOTO = resize_image(skimage.data.coffee(), 512, 256)
"""Sides that every detector takes as they are."""
PARAMS = {"resolution": 0, "safe": False, "value_threshold": 0.1, "distance_threshold": 0.1}

LIBRARY: dict[str, tuple[Annotator, Callable[[Any, Looking], Any]]] = {
    "hed": (softedge.hed, lambda library, network: library.HEDdetector(network)),
    "pidinet": (softedge.pidinet, lambda library, network: library.PidiNetDetector(network)),
    "lineart": (lineart.realistic, lambda library, network: library.LineartDetector(network, network)),
    "lineart_coarse": (lineart.coarse, lambda library, network: library.LineartDetector(network, network)),
    "lineart_anime": (lineart.anime, lambda library, network: library.LineartAnimeDetector(network)),
    "mlsd": (lineart.mlsd, lambda library, network: library.MLSDdetector(network)),
    "normal_bae": (depth.normal_bae, lambda library, network: library.NormalBaeDetector(network)),
    "midas": (depth.midas, lambda library, network: library.MidasDetector(network)),
}


@pytest.fixture(scope="module")
def library() -> Iterator[ModuleType]:
    with reference_library() as package:
        yield package


def shown(detector: Annotator, name: str) -> Tensor:
    network = Looking()
    return network.shown(lambda: detector(Source(PHOTO, None, 0, PARAMS, {name: network})))


@pytest.mark.parametrize("name", LIBRARY)
def test_as_the_library_shows_it(library: ModuleType, name: str) -> None:
    detector, build = LIBRARY[name]
    theirs = Looking()
    expected = theirs.shown(
        lambda: build(library, theirs)(PHOTO, detect_resolution=256, image_resolution=256, output_type="np")
    )
    assert torch.allclose(shown(detector, name), expected, atol=1e-6)


def imagenet(**options: Any) -> dict[str, Any]:
    return {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], **options}


PROCESSORS: dict[str, tuple[Annotator, Callable[[], Any]]] = {
    # The preprocessor_config.json of each repository, where its fields are not the class's own; sides fit already.
    "depth_anything_v2": (
        depth.depth_anything,
        lambda: transformers.DPTImageProcessor(do_resize=False, **imagenet()),
    ),
    "upernet": (segmentation.upernet, lambda: transformers.SegformerImageProcessor(do_resize=False, **imagenet())),
    "zoe": (depth.zoe, lambda: transformers.ZoeDepthImageProcessor(ensure_multiple_of=32)),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_as_the_processor_of_transformers_makes_it(name: str) -> None:
    detector, build = PROCESSORS[name]
    expected = build()(PHOTO, return_tensors="pt")["pixel_values"]
    seen = shown(detector, name)
    assert seen.shape[1:] == expected.shape[1:]
    assert torch.allclose(seen[:1], expected, atol=1e-4)
    if name == "zoe":
        assert torch.equal(seen[1], seen[0].flip(2))


def test_leres_gets_what_its_own_repository_makes() -> None:
    """``scale_torch`` of AdelaiDepth/LeReS on RGB bytes; what controlnet-aux makes of it is named in ``leres``."""
    prepare = TRANSFORMS.Compose(
        [TRANSFORMS.ToTensor(), TRANSFORMS.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )
    assert torch.allclose(shown(depth.leres, "leres")[0], prepare(PHOTO), atol=1e-5)


def test_openpose_sees_blue_first_at_half_of_its_box() -> None:
    """OpenPose's models are Caffe's: BGR in -0.5..0.5; 184 pixels high, right border continued to a multiple of 8."""
    photo = resize_image(PHOTO, 368, 368)  # shrinks by two: each pixel is the mean of four
    network = Looking()
    seen = network.shown(lambda: pose.body(Source(photo, None, 0, PARAMS, {"openpose_body": network})))
    means = photo.reshape(184, 2, 184, 2, 3).astype(np.float64).mean(axis=(1, 3))
    assert seen.shape == (1, 3, 184, 184)
    expected = means[:, :, ::-1].transpose(2, 0, 1) / 256 - 0.5
    assert np.abs(seen[0].numpy() - expected).max() <= 0.51 / 256


def test_a_strip_is_continued_in_grey_for_openpose() -> None:
    """To a quarter of its width, below; grey is 0 in the network's range."""
    network = Looking()
    strip = PHOTO[:64]
    seen = network.shown(lambda: pose.body(Source(strip, None, 0, PARAMS, {"openpose_body": network})))
    assert seen.shape == (1, 3, 184, 736)  # of 512 x 128
    assert (seen[:, :, 96:].abs() <= 1 / 256).all()  # resizing rings
    assert (seen[:, :, :88] != 0).float().mean() > 0.9


def test_who_sees_the_whole_picture_sees_it_at_the_nearest_multiple() -> None:
    network = Looking(patch_size=14)
    source = Source(resize_image(PHOTO, 517, 333), None, 0, PARAMS, {"depth_anything_v2": network})
    assert network.shown(lambda: depth.depth_anything(source)).shape == (1, 3, 336, 518)


@pytest.mark.parametrize(("size", "multiple"), [((130, 70), 32), ((67, 33), 8)])
def test_what_is_continued_is_mirrored(size: tuple[int, int], multiple: int) -> None:
    """Beyond the right and the lower border, so that no edge is made there."""
    photo = resize_image(PHOTO, *size)
    network = Looking()
    name, detector = ("normal_bae", depth.normal_bae) if multiple == 32 else ("pidinet", softedge.pidinet)
    seen = network.shown(lambda: detector(Source(photo, None, 0, PARAMS, {name: network})))
    padded = np.pad(photo, ((0, -size[1] % multiple), (0, -size[0] % multiple), (0, 0)), mode="reflect")
    pixels = torch.from_numpy(padded.copy()).permute(2, 0, 1) / 255
    normal = TRANSFORMS.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(pixels)
    assert torch.allclose(seen[0], pixels.flip(0) if name == "pidinet" else normal, atol=1e-5)
