"""The detectors against the libraries they come from, with the same random weights, at sizes those take as they are."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import skimage.data
import torch
import transformers

from serve_app.annotators.depth import midas_depth, zoe_metres
from serve_app.annotators.lineart import segments
from serve_app.images import resize_image
from serve_app.tasks import ImageArray
from support.detectors import Detectors, reference_library

PHOTO: ImageArray = resize_image(skimage.data.astronaut(), 128, 128)


@pytest.fixture(scope="module")
def library() -> Iterator[ModuleType]:
    with reference_library() as package:
        yield package


@pytest.mark.parametrize("scribble", [False, True])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["hed", "pidinet"])
def test_soft_edges(library: ModuleType, detectors: Detectors, name: str, safe: bool, scribble: bool) -> None:
    ours, _ = detectors.annotate(f"scribble_{name}" if scribble else name, PHOTO, (128, 128), safe=safe)
    kind = {"hed": library.HEDdetector, "pidinet": library.PidiNetDetector}[name]
    with detectors.host.lease((name,)) as networks:
        theirs = kind(networks[name])(PHOTO, 128, 128, safe=safe, scribble=scribble, output_type="np")
    assert np.abs(ours.astype(int) - theirs).max() <= (0 if scribble else 1)


@pytest.mark.parametrize("coarse", [False, True])
def test_line_art(library: ModuleType, detectors: Detectors, coarse: bool) -> None:
    names = ("lineart", "lineart_coarse")
    ours, _ = detectors.annotate("lineart_coarse" if coarse else "lineart_realistic", PHOTO, (128, 128))
    for name in names:
        detectors.need(name)
    with detectors.host.lease(names) as networks:
        detector = library.LineartDetector(*(networks[name] for name in names))
        theirs = detector(PHOTO, coarse, 128, 128, output_type="np")
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_anime_line_art(library: ModuleType, detectors: Detectors) -> None:
    photo = resize_image(PHOTO, 256, 256)
    ours, _ = detectors.annotate("lineart_anime", photo, (256, 256))
    with detectors.host.lease(("lineart_anime",)) as networks:
        theirs = library.LineartAnimeDetector(networks["lineart_anime"])(photo, 256, 256, output_type="np")
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_normals(library: ModuleType, detectors: Detectors) -> None:
    ours, _ = detectors.annotate("normal_bae", PHOTO, (128, 128))
    with detectors.host.lease(("normal_bae",)) as networks:
        theirs = library.NormalBaeDetector(networks["normal_bae"])(PHOTO, 128, 128, output_type="np")
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_straight_lines(library: ModuleType, detectors: Detectors) -> None:
    assert library
    ours, _ = detectors.annotate("mlsd", PHOTO, (128, 128))
    with detectors.host.lease(("mlsd",)) as networks:
        theirs = library.MLSDdetector(networks["mlsd"])(
            PHOTO, detect_resolution=128, image_resolution=128, output_type="np"
        )
    assert theirs.any()
    assert np.array_equal(ours, theirs)
    assert segments(torch.full((1, 9, 8, 8), -9.0), 0.1, 0.1).shape == (0, 4)


def test_zoe(detectors: Detectors) -> None:
    detectors.need("zoe")
    processor = transformers.ZoeDepthImageProcessor(
        size={"height": 64, "width": 85}, ensure_multiple_of=32, keep_aspect_ratio=True
    )
    photo = resize_image(PHOTO, 150, 90)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    with detectors.host.lease(("zoe",)) as networks:
        ours = zoe_metres(networks["zoe"], pixels)[0, 0]
        inputs = processor(photo, return_tensors="pt")["pixel_values"]
        outputs, flipped = networks["zoe"](inputs), networks["zoe"](inputs.flip(3))
        (theirs,) = processor.post_process_depth_estimation(outputs, [(90, 150)], outputs_flipped=flipped)
    assert torch.allclose(ours, theirs["predicted_depth"], atol=1e-4)
    assert ours.std() > 0


def test_midas_on_a_square_is_transformers_own(detectors: Detectors) -> None:
    detectors.need("midas")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with detectors.host.lease(("midas",)) as networks:
        assert torch.equal(midas_depth(networks["midas"], pixels), networks["midas"](pixels).predicted_depth)


def test_depth_anything_and_upernet_get_what_their_processors_make(detectors: Detectors) -> None:
    photo = resize_image(PHOTO, 140, 112)
    ours, _ = detectors.annotate("depth_anything_v2", photo, (140, 112))
    processor = transformers.DPTImageProcessor(
        do_resize=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    with detectors.host.lease(("depth_anything_v2",)) as networks:
        (depth,) = networks["depth_anything_v2"](processor(photo, return_tensors="pt")["pixel_values"]).predicted_depth
    theirs = ((depth - depth.min()) / (depth.max() - depth.min()) * 255).numpy()
    assert np.abs(ours[:, :, 0] - theirs).max() <= 1

    ours, _ = detectors.annotate("upernet", PHOTO, (128, 128))
    processor = transformers.SegformerImageProcessor(do_resize=False)
    with detectors.host.lease(("upernet",)) as networks:
        outputs = networks["upernet"](**processor(PHOTO, return_tensors="pt"))
        (labels,) = processor.post_process_semantic_segmentation(outputs, [(128, 128)])
    from serve_app.annotators.isolation import part

    palette = np.array(part("util").ade_palette(), np.uint8)
    assert (ours == palette[labels.numpy()]).all(axis=2).mean() > 0.999
