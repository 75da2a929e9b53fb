"""What every annotator with weights promises, over all rows: random weights, the real file formats and loading code."""

import io
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from PIL import Image

from serve_app.annotators import ANNOTATORS, Param, Switch
from serve_app.config import ImageLimits
from serve_app.errors import JobError
from serve_app.images import decode_image, resize_image
from serve_app.tasks import ImageArray
from support.detectors import Detectors

LARGE = {"leres", "openpose_body", "openpose_hand", "openpose_face", "openpose_full"}
"""Networks of hundreds of megabytes that can't be made smaller, or a second a call: the long form only."""
NAMES = [
    pytest.param(name, marks=pytest.mark.full) if name in LARGE else name
    for name, row in ANNOTATORS.items()
    if row.networks
]
POSES = {name for name in ANNOTATORS if name.startswith("openpose")}
"""Random weights find nobody: their maps are black. What they draw is tested in test_pose.py."""
COLOURS = {"upernet", "normal_bae", "mediapipe_face", *POSES}


def photo(name: str = "astronaut", height: int = 150, width: int = 220) -> ImageArray:
    pixels: ImageArray = getattr(skimage.data, name)()
    return resize_image(pixels, width, height)


@pytest.mark.parametrize("name", NAMES)
class TestEveryDetector:
    def test_the_map_has_the_outputs_size(self, detectors: Detectors, name: str) -> None:
        for image, size in ((photo(), (96, 64)), (photo("coffee", 9, 400), (72, 200)), (photo(width=1), (96, 64))):
            control_map, info = detectors.annotate(name, image, size)
            assert control_map.shape == (size[1], size[0], 3)
            assert control_map.dtype == np.uint8
            assert info.annotator == name
            assert name in COLOURS or np.array_equal(control_map[:, :, 0], control_map[:, :, 2])

    def test_equal_input_gives_an_equal_map_and_is_left_alone(self, detectors: Detectors, name: str) -> None:
        image = photo()
        size = (128, 96)  # smaller faces are not drawn
        state = str(np.random.get_state(legacy=False))  # noqa: NPY002  - the global generator, which must not move
        first, info = detectors.annotate(name, image, size)
        assert np.array_equal(image, photo())
        assert np.array_equal(first, detectors.annotate(name, photo(), size)[0])
        assert state == str(np.random.get_state(legacy=False))  # noqa: NPY002  - same
        assert info.empty == (name in POSES)
        if name not in POSES:
            assert not np.array_equal(first, detectors.annotate(name, photo("chelsea"), size)[0])

    def test_two_threads_at_once_do_not_disturb_each_other(self, detectors: Detectors, name: str) -> None:
        images = [photo("astronaut"), photo("coffee")]
        alone = [detectors.annotate(name, image)[0] for image in images]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda image: detectors.annotate(name, image)[0], images))
        assert all(np.array_equal(*pair) for pair in zip(alone, together, strict=True))

    def test_awkward_files_annotate_like_plain_ones(self, detectors: Detectors, name: str) -> None:
        grey = Image.fromarray(photo("coffee", 96, 128)).convert("L")
        plain = detectors.annotate(name, np.array(grey.convert("RGB")))[0]
        for mode in ("P", "LA", "CMYK", "I;16"):
            awkward = {"I;16": lambda: Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)}
            source = awkward.get(mode, lambda mode=mode: grey.convert("RGB").convert(mode))()
            buffer = io.BytesIO()
            source.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
            control_map = detectors.annotate(name, decode_image(buffer.getvalue(), ImageLimits()))[0]
            assert control_map.shape == plain.shape
            if mode in {"LA", "I;16"}:
                assert np.array_equal(control_map, plain)

    def test_a_rotated_camera_picture_annotates_upright(self, detectors: Detectors, name: str) -> None:
        upright = photo("coffee", 96, 128)
        exif = Image.Exif()
        exif[0x0112] = 6  # stored turned left by a quarter
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(buffer, "PNG", exif=exif.tobytes())
        turned = decode_image(buffer.getvalue(), ImageLimits())
        assert np.array_equal(detectors.annotate(name, turned)[0], detectors.annotate(name, upright)[0])

    def test_a_blank_photo_makes_a_map_without_a_warning(self, detectors: Detectors, name: str) -> None:
        with np.errstate(all="raise", under="ignore"):
            control_map, _ = detectors.annotate(name, np.full((50, 60, 3), 128, np.uint8))
        assert control_map.shape == (64, 96, 3)

    def test_parameters_are_echoed_and_bad_ones_refused(self, detectors: Detectors, name: str) -> None:
        declared = ANNOTATORS[name].params
        assert "resolution" in {param.name for param in declared}
        _, info = detectors.annotate(name, photo(), (64, 64))
        assert dict(info.params) == {param.name: param.default for param in declared}
        for param in declared:
            bad = ("yes", None, 1) if isinstance(param, Switch) else (True, "1", None, math.nan, param.maximum + 1)
            for value in bad:
                with pytest.raises(JobError, match=param.name):
                    detectors.annotate(name, photo(), (64, 64), **{param.name: value})
        with pytest.raises(JobError, match="no_such"):
            detectors.annotate(name, photo(), (64, 64), no_such=1)

    def test_every_parameter_matters_within_its_range(self, detectors: Detectors, name: str) -> None:
        for param in ANNOTATORS[name].params:
            values = [not param.default] if isinstance(param, Switch) else [param.minimum, _upper(param)]
            for value in values:
                control_map, info = detectors.annotate(name, photo(), (96, 64), **{param.name: value})
                assert control_map.shape == (64, 96, 3)
                assert info.params[param.name] == value

    def test_the_smallest_resolution_is_enough_for_a_strip(self, detectors: Detectors, name: str) -> None:
        for size in ((1024, 64), (64, 1024)):
            assert detectors.annotate(name, photo(), size, resolution=64)[0].shape == (size[1], size[0], 3)
        for resolution in (1, 63, 1025):
            with pytest.raises(JobError, match="0 or from 64 to 1024"):
                detectors.annotate(name, photo(), (1024, 64), resolution=resolution)


def _upper(param: Param) -> float:
    """1024 pixels would take minutes and say nothing new."""
    return 64 if param.name == "resolution" else param.maximum
