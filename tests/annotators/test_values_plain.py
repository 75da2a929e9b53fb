"""Annotators without networks against references that share no code with them: scipy, Pillow and controlnet-aux."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy.ndimage import gaussian_filter

from serve_app.annotators import ANNOTATORS, annotate, keeps_lines
from serve_app.controls import CONTROL_TYPES
from serve_app.errors import AnnotatorUnavailable
from serve_app.images import resize_image
from serve_app.tasks import AnnotationTask, ControlMap, ImageArray, JsonScalar
from support.detectors import reference_library

PHOTO = resize_image(skimage.data.coffee(), 192, 128)


def made(control_type: str, image: ImageArray, **params: JsonScalar) -> ControlMap:
    task = AnnotationTask(control_type=control_type, width=192, height=128, seed=3, params=params)
    return annotate(task, image, None)[0]


@pytest.fixture(scope="module")
def library() -> Iterator[ModuleType]:
    with reference_library() as package:
        yield package


@pytest.mark.parametrize(("given", "threshold"), [({}, 32), ({"threshold": 8}, 8), ({"threshold": 90}, 90)])
def test_strokes_are_a_difference_of_gaussians(given: dict[str, JsonScalar], threshold: int) -> None:
    pixels = PHOTO.astype(np.float64)
    wide, fine = (gaussian_filter(pixels, (sigma, sigma, 0), mode="mirror") for sigma in (5.0, 0.5))
    darker = 2 * (wide - fine).min(axis=2)
    clear = np.abs(darker - threshold) > 0.1  # the rest is rounding
    assert clear.mean() > 0.98
    drawn = made("scribble", PHOTO, **given)
    assert np.array_equal(drawn[:, :, 0][clear], np.where(darker > threshold, 255, 0)[clear])
    assert drawn.any()


@pytest.mark.parametrize(("sigma", "threshold"), [(6.0, 8), (2.0, 8), (6.0, 40)])
def test_standard_line_art_is_the_librarys(library: ModuleType, sigma: float, threshold: int) -> None:
    theirs = library.LineartStandardDetector()(PHOTO, sigma, threshold, detect_resolution=128, output_type="np")
    given: dict[str, JsonScalar] = {"sigma": sigma, "threshold": threshold}
    ours = made("lineart", PHOTO, **({} if (sigma, threshold) == (6.0, 8) else given))
    assert np.array_equal(ours, theirs)
    assert ours.max() > 200


@pytest.mark.parametrize("scale", [16, 64, 256])
def test_shuffling_folds_as_the_library_does(library: ModuleType, monkeypatch: pytest.MonkeyPatch, scale: int) -> None:
    """With the same random numbers, which it would take from numpy's global generator."""
    random = np.random.default_rng(3)
    monkeypatch.setattr(np.random, "uniform", lambda **asked: random.random(asked["size"], dtype=np.float32))
    theirs = library.ContentShuffleDetector()(
        PHOTO, f=scale, detect_resolution=128, image_resolution=128, output_type="np"
    )
    ours = made("shuffle", PHOTO, scale=scale)
    assert np.abs(ours.astype(int) - theirs).mean() < 0.5
    if scale == 256:
        assert np.array_equal(ours, made("shuffle", PHOTO))


def test_a_tile_is_the_picture_and_invert_its_negative() -> None:
    large = skimage.data.coffee()
    resized = np.asarray(Image.fromarray(large).resize((192, 128), Image.Resampling.LANCZOS))
    assert np.abs(made("tile", large).astype(int) - resized).max() <= 1
    task = AnnotationTask(control_type="lineart", annotator="invert", width=192, height=128)
    assert np.array_equal(annotate(task, PHOTO, None)[0].astype(int) + PHOTO, np.full(PHOTO.shape, 255))


DRAWING: ImageArray = np.repeat(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (64, 64, 1)), 3, axis=2)
LINES = [name for name, row in CONTROL_TYPES.items() if row.lines]


def levels(control_type: str, annotator: str | None, *, auto_hint: bool = True) -> int:
    task = AnnotationTask(
        control_type=control_type, annotator=annotator, auto_hint=auto_hint, width=520, height=200, seed=3
    )
    return len(np.unique(annotate(task, DRAWING, None)[0]))


@pytest.mark.parametrize("control_type", LINES)
def test_a_line_drawing_gets_no_levels_between_black_and_white(control_type: str) -> None:
    assert levels(control_type, None, auto_hint=False) == 2
    for name in CONTROL_TYPES[control_type].annotators:
        if name != "lineart_standard" and not (name != "none" and ANNOTATORS[name].networks):
            assert levels(control_type, name) == 2, name


def test_only_what_draws_no_lines_itself_keeps_them() -> None:
    assert levels("tile", None) > 2
    kept = {
        (kind, name)
        for kind, row in CONTROL_TYPES.items()
        for name in row.annotators
        if keeps_lines(kind, name, auto_hint=True)
    }
    drawn = {(kind, "invert") for kind in ("canny", "scribble", "lineart", "lineart_anime")}
    assert kept == {("qrcode", "tile")} | drawn | {(kind, "none") for kind in LINES}
    assert keeps_lines("qrcode", None, auto_hint=True)
    assert not keeps_lines("canny", None, auto_hint=True)
    assert keeps_lines("canny", None, auto_hint=False)
    with pytest.raises(AnnotatorUnavailable, match="Allowed: canny, invert, none"):
        keeps_lines("canny", "hed", auto_hint=True)
