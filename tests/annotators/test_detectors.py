"""What every annotator promises, one suite over all rows: random weights, the real file formats and loading code.

What the maps show is compared with other libraries in test_values_*.py, test_parity.py and test_drawing.py.
"""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file

from serve_app.annotators import ANNOTATORS, Param, Switch, networks
from serve_app.config import ImageLimits
from serve_app.errors import JobError, ModelLoadFailed
from serve_app.images import decode_image, resize_image
from serve_app.tasks import AnnotationInfo, ControlMap, ImageArray, JsonScalar
from support.detectors import Detectors, published_state

POSES = [name for name in ANNOTATORS if name.startswith("openpose")]
LARGE = POSES[1:]
"""These look for bodies first, with the same network as the first: the long form repeats that for each."""
NAMES = [pytest.param(name, marks=pytest.mark.full) if name in LARGE else name for name in (*ANNOTATORS, "none")]
COLOURS = {"upernet", "normal_bae", "mediapipe_face", "invert", "shuffle", "tile", "inpaint", "none", *POSES}
"""All others make three equal channels."""
DETECTORS = [name for name, row in ANNOTATORS.items() if row.networks]
SIZES = {"mediapipe_face": (128, 96)} | dict.fromkeys(POSES, (64, 128))
"""Smaller faces are not drawn; the network of bodies works at one height: a high picture costs the least."""

MODES = ("EXIF", "L", "LA", "RGBA", "I;16", "P", "CMYK", "1")
"""Of files that are no plain RGB."""
INEXACT = {"P", "CMYK", "1"}
"""They hold other colours than they were made of."""
AWKWARD = [
    pytest.param(
        name, mode, marks=[pytest.mark.full] if name in LARGE or (name in DETECTORS and mode != "EXIF") else []
    )
    for name, mode in product((*ANNOTATORS, "none"), MODES)
    if not (name in POSES and mode == "1")  # black and white dots are crowds
]
"""All modes for the rows without networks; for networks, which see decoded pixels alone, the one that turns pictures,
and the others in the long form."""


def photo(name: str = "astronaut", height: int = 150, width: int = 220) -> ImageArray:
    """Dimmed, with one white spot where the stand-in for OpenPose's network sees a person, unless it is very narrow."""
    pixels: ImageArray = resize_image(getattr(skimage.data, name)(), width, height) // 4 * 3
    if min(height, width) >= 40:
        middle = (int(width * (0.4 if name == "astronaut" else 0.6)), int(height * 0.45))
        cv2.circle(pixels, middle, min(height, width) // 12, (255, 255, 255), -1)
    return pixels


def hole(height: int = 60, width: int = 45) -> ImageArray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 255
    return mask


def run(
    detectors: Detectors, name: str, image: ImageArray, size: tuple[int, int] | None = None, **params: JsonScalar
) -> tuple[ControlMap, AnnotationInfo]:
    """At a small resolution where that is not what is asked about: people are searched for in its pixels."""
    if name in POSES and "resolution" not in params:
        params["resolution"] = 64
    return detectors.annotate(name, image, size or SIZES.get(name, (96, 64)), hole(), **params)


def check_form(control_map: ControlMap, name: str, size: tuple[int, int]) -> None:
    assert control_map.shape == (size[1], size[0], 3)
    if name == "inpaint":
        assert control_map.dtype == np.float32
        kept = control_map[control_map != -1]
        assert kept.min() >= 0
        assert kept.max() <= 1
    else:
        assert control_map.dtype == np.uint8
        assert name in COLOURS or (control_map == control_map[:, :, :1]).all()


@pytest.mark.parametrize("name", NAMES)
class TestEveryRow:
    def test_the_map_has_the_outputs_size(self, detectors: Detectors, name: str) -> None:
        sizes = SIZES.get(name, (96, 64)), (40, 104), (64, 128) if name in POSES else (72, 48)
        for image, size in zip((photo(), photo("coffee", 9, 400), photo(width=1)), sizes, strict=True):
            control_map, info = run(detectors, name, image, size)
            check_form(control_map, name, size)
            assert info.annotator == name

    def test_equal_input_gives_an_equal_map_in_two_threads_at_once(self, detectors: Detectors, name: str) -> None:
        images = [photo("astronaut"), photo("coffee")]
        state = str(np.random.get_state(legacy=False))  # noqa: NPY002  - the global generator, which must not move
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda image: run(detectors, name, image), images))
        assert state == str(np.random.get_state(legacy=False))  # noqa: NPY002  - same
        assert np.array_equal(images[0], photo("astronaut")), "the picture was written to"
        (first, _), (second, _) = together
        assert np.array_equal(run(detectors, name, images[0])[0], first)
        assert not np.array_equal(first, second)
        assert not any(info.empty for _, info in together)

    def test_a_blank_photo_makes_a_map_without_a_warning(self, detectors: Detectors, name: str) -> None:
        with np.errstate(all="raise", under="ignore"):
            control_map, _ = run(detectors, name, np.full((50, 60, 3), 128, np.uint8))
        check_form(control_map, name, SIZES.get(name, (96, 64)))

    def test_parameters_are_echoed_and_bad_ones_refused(self, detectors: Detectors, name: str) -> None:
        declared = ANNOTATORS[name].params if name != "none" else ()
        chosen: dict[str, JsonScalar] = {"resolution": 64} if name in POSES else {}
        _, info = detectors.annotate(name, photo(), (64, 64), hole(), **chosen)
        assert dict(info.params) == {param.name: param.default for param in declared} | chosen
        for param in declared:
            bad: tuple[JsonScalar, ...] = ("yes", None, 1)
            if isinstance(param, Param):
                beyond = (param.minimum - 1, param.maximum + 1) if param.minimum != 1 or not param.or_zero else ()
                bad = (True, "1", None, math.nan, math.inf, *beyond)
            for value in bad:
                with pytest.raises(JobError, match=param.name):
                    detectors.annotate(name, photo(), (64, 64), hole(), **{param.name: value})
        if name != "none":
            with pytest.raises(JobError, match="no_such"):
                detectors.annotate(name, photo(), (64, 64), hole(), no_such=1)

    def test_every_parameter_changes_the_map(self, detectors: Detectors, name: str) -> None:
        params = ANNOTATORS[name].params if name != "none" else ()
        for param in params:
            if name in POSES:  # their default is as many pixels as a person is found in
                small, large = (run(detectors, name, photo(), resolution=value)[0] for value in (64, 72))
                assert not np.array_equal(small, large)
                continue
            size = (144, 96) if param.name == "resolution" else None
            default = run(detectors, name, photo(), size)[0]
            for value in _others(param):
                control_map, info = run(detectors, name, photo(), size, **{param.name: value})
                assert info.params[param.name] == value
                assert not np.array_equal(control_map, default), f"{param.name}={value} changes nothing"


def awkward_file(mode: str, grey: Image.Image) -> bytes:
    """``grey`` in a file of this mode; of EXIF: stored turned left by a quarter."""
    options: dict[str, bytes] = {}
    match mode:
        case "P":
            picture = grey.quantize(256)
        case "I;16":
            picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
        case "EXIF":
            exif = Image.Exif()
            exif[0x0112] = 6
            picture, options = grey.convert("RGB").transpose(Image.Transpose.ROTATE_90), {"exif": exif.tobytes()}
        case _:
            picture = grey.convert("RGB").convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "mode"), AWKWARD)
def test_awkward_files_annotate_like_plain_ones(detectors: Detectors, name: str, mode: str) -> None:
    width, height = SIZES.get(name, (96, 64))
    grey = Image.fromarray(photo("coffee", height, width)).convert("L")
    decoded = decode_image(awkward_file(mode, grey), ImageLimits())
    assert decoded.shape == (height, width, 3)
    control_map = run(detectors, name, decoded)[0]
    check_form(control_map, name, (width, height))
    if mode not in INEXACT:
        assert np.array_equal(control_map, run(detectors, name, np.array(grey.convert("RGB")))[0])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n in POSES else n for n in DETECTORS if n not in LARGE]
)
def test_the_smallest_resolution_is_enough_for_a_strip(detectors: Detectors, name: str) -> None:
    assert "resolution" in {param.name for param in ANNOTATORS[name].params}
    assert detectors.annotate(name, photo(), (1024, 64), resolution=64)[0].shape == (64, 1024, 3)
    for resolution in (1, 63, 1025):
        with pytest.raises(JobError, match="0 or from 64 to 1024"):
            detectors.annotate(name, photo(), (1024, 64), resolution=resolution)


def test_weights_of_half_precision_become_float32(tmp_path: Path) -> None:
    halves = {key: tensor.half() for key, tensor in published_state("lineart").items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = networks.lineart(tmp_path / "half.safetensors").state_dict()
    assert loaded.keys() == halves.keys()
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, halves[key].float()) for key, tensor in loaded.items()
    )


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state, path = published_state("lineart"), tmp_path / "changed.safetensors"
    first = next(iter(state))
    save_file({**state, "another.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelLoadFailed, match=r"0 of \d+ are missing, 1 left over: another.weight"):
        networks.lineart(path)
    save_file({key: tensor for key, tensor in state.items() if key != first}, path)
    with pytest.raises(ModelLoadFailed, match=rf"1 of \d+ are missing, 0 left over: {first}"):
        networks.lineart(path)
    save_file({**state, first: state[first][:1].clone()}, path)
    with pytest.raises(ModelLoadFailed, match="size mismatch"):
        networks.lineart(path)


def _others(param: Param | Switch) -> tuple[float, ...]:
    """Values far from the default, both ways where both can be told with random weights; cheap ones of resolution."""
    if isinstance(param, Switch):
        return (not param.default,)
    told = {"low_threshold": (0, 190), "high_threshold": (110, 255), "value_threshold": (1,)}
    told |= {"distance_threshold": (20,), "resolution": (64,)}
    ends = tuple(value for value in (param.minimum, param.maximum) if value != param.default)
    return told.get(param.name, ends)
