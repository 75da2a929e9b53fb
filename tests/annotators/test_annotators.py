"""What annotators without networks promise of their own; what all rows promise is in test_detectors.py."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import skimage.data
import skimage.transform
from diffusers.image_processor import VaeImageProcessor
from numpy.typing import NDArray
from PIL import Image

from serve_app.annotators import ANNOTATORS, Switch, annotate
from serve_app.controls import CONTROL_TYPES
from serve_app.errors import AnnotatorUnavailable, JobError
from serve_app.images import resize_image
from serve_app.tasks import AnnotationTask, ControlMap, ImageArray, JsonScalar

SIZES = [(512, 768), (768, 512), (64, 1024)]
WEIGHTLESS = [name for name, row in CONTROL_TYPES.items() if not ANNOTATORS[row.annotator].networks]
"""Control types whose default annotator needs no weights."""


def photo(name: str = "astronaut", height: int = 333, width: int = 517) -> ImageArray:
    picture = {"astronaut": skimage.data.astronaut, "coffee": skimage.data.coffee, "chelsea": skimage.data.chelsea}
    pixels: ImageArray = picture[name]()
    return resize_image(pixels, width, height)


def hole(height: int = 90, width: int = 70) -> ImageArray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 255
    return mask


def made(
    control_type: str,
    image: ImageArray,
    size: tuple[int, int] = (128, 96),
    mask: ImageArray | None = None,
    seed: int = 7,
    **params: JsonScalar,
) -> ControlMap:
    task = AnnotationTask(control_type=control_type, width=size[0], height=size[1], seed=seed, params=params)
    return annotate(task, image, hole() if mask is None else mask)[0]


class TestTable:
    def test_both_tables_name_the_same_annotators(self) -> None:
        assert {name for row in CONTROL_TYPES.values() for name in row.annotators} == {*ANNOTATORS, "none"}

    def test_the_package_loads_no_detector(self) -> None:
        code = (
            "import sys, serve_app.annotators\n"
            "heavy = {'torch', 'cv2', 'controlnet_aux', 'timm', 'mediapipe', 'serve_app.annotators.edges'}\n"
            "print(*sorted(heavy & set(sys.modules)), end='')"
        )
        assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b""

    @pytest.mark.parametrize("name", ANNOTATORS)
    def test_parameters_are_in_their_own_ranges_and_explained(self, name: str) -> None:
        for param in ANNOTATORS[name].params:
            assert param.read(param.default) == param.default
            assert param.help
            if isinstance(param, Switch):
                continue
            assert param.minimum < param.maximum
            assert 0 < param.step <= param.maximum - param.minimum


class TestAlignment:
    """The map lies where the output's pixels lie: an edge is at most one pixel off."""

    @pytest.mark.parametrize(("width", "height"), SIZES)
    @pytest.mark.parametrize("control_type", ["canny", "scribble", "lineart"])
    def test_the_edges_of_a_square_stay_at_their_place(self, control_type: str, width: int, height: int) -> None:
        source = np.full((333, 517, 3), 230, np.uint8)
        top, bottom, left, right = 100, 233, 150, 400
        source[top:bottom, left:right] = 20
        control_map = made(control_type, source, (width, height))[:, :, 0]
        rows = np.flatnonzero(control_map[:, width * 275 // 517] > 127)
        columns = np.flatnonzero(control_map[height * 166 // 333] > 127)
        for found, size, full, first, last in (
            (rows, height, 333, top, bottom),
            (columns, width, 517, left, right),
        ):
            assert abs(found.min() - first * size / full) <= 1
            assert abs(found.max() + 1 - last * size / full) <= 1

    @pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
    @pytest.mark.parametrize(("width", "height"), SIZES)
    def test_a_photos_edge_map_lies_on_its_gradients(self, name: str, width: int, height: int) -> None:
        """The best match between the map and the gradients of the photo, resized by another library, is in place."""
        source = photo(name)
        resized = skimage.transform.resize(source.mean(axis=2), (height, width), anti_aliasing=True)
        gradient = np.hypot(*np.gradient(resized))
        edges = made("canny", source, (width, height))[:, :, 0].astype(float)
        shifts = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)]
        best = max(shifts, key=lambda shift: float((np.roll(edges, shift, axis=(0, 1)) * gradient).sum()))
        assert max(abs(best[0]), abs(best[1])) <= 1


class TestCanny:
    @pytest.mark.parametrize(("low", "high"), [(100, 200), (20, 60), (0, 1)])
    def test_it_is_opencvs(self, low: int, high: int) -> None:
        image = photo("coffee", 96, 128)
        edges: NDArray[np.uint8] = cv2.Canny(image, low, high)
        control_map = made("canny", image, low_threshold=low, high_threshold=high)
        assert all(np.array_equal(control_map[:, :, channel], edges) for channel in range(3))

    @pytest.mark.parametrize("low", [200, 201])
    def test_thresholds_that_leave_nothing_between_are_refused(self, low: int) -> None:
        with pytest.raises(JobError, match=f"low_threshold must be below high_threshold, got {low} and 200"):
            made("canny", photo(), low_threshold=low)

    def test_lines_are_black_and_white(self) -> None:
        for control_type in ("canny", "scribble"):
            assert set(np.unique(made(control_type, photo()))) == {0, 255}


class TestShuffle:
    def test_the_seed_decides(self) -> None:
        assert np.array_equal(made("shuffle", photo(), seed=1), made("shuffle", photo(), seed=1))
        assert not np.array_equal(made("shuffle", photo(), seed=1), made("shuffle", photo(), seed=2))

    def test_colours_stay_and_places_change(self) -> None:
        halves = np.zeros((256, 256, 3), np.uint8)
        halves[:, :128] = (255, 0, 0)
        halves[:, 128:] = (0, 0, 255)
        shuffled = made("shuffle", halves, (256, 256), scale=32)
        assert shuffled[:, :, 1].max() == 0
        assert (shuffled[:, :, 0] > 200).any()
        assert (shuffled[:, :, 2] > 200).any()
        assert np.abs(shuffled.astype(int) - halves).mean() > 30


class TestInpaint:
    def test_masked_pixels_are_minus_one_and_the_rest_is_the_picture(self) -> None:
        image = photo("coffee", 96, 128)
        mask = np.zeros((96, 128), np.uint8)
        mask[10:20, 30:50] = 255
        mask[0, 0], mask[0, 1] = 127, 128
        control_map = made("inpaint", image, mask=mask)
        masked = mask > 127
        assert control_map.dtype == np.float32
        assert (control_map[masked] == -1).all()
        assert np.allclose(control_map[~masked], image[~masked] / 255)

    def test_a_mask_of_another_size_is_brought_to_the_outputs(self) -> None:
        mask = np.zeros((10, 10), np.uint8)
        mask[:, 5:] = 255
        control_map = made("inpaint", photo(), (100, 60), mask)
        assert (control_map[:, 50:] == -1).all()
        assert (control_map[:, :50] >= 0).all()

    @pytest.mark.parametrize(("width", "height"), [(128, 96), (64, 512), (256, 64)])
    def test_the_hole_is_the_mask_that_diffusers_blends_with(self, width: int, height: int) -> None:
        processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
        strokes = np.random.default_rng(3).integers(0, 256, (150, 170), dtype=np.uint8)
        for mask in (strokes, strokes[:20, :30], np.tile(np.arange(256, dtype=np.uint8), (7, 1)), hole()):
            blended = processor.preprocess(Image.fromarray(mask), height, width)[0, 0].numpy()
            control_map = made("inpaint", photo(), (width, height), mask)
            assert np.array_equal((control_map == -1).all(axis=2), blended == 1)

    @pytest.mark.parametrize("auto_hint", [True, False])
    def test_without_a_mask_it_says_so(self, auto_hint: bool) -> None:
        task = AnnotationTask(control_type="inpaint", width=64, height=64, auto_hint=auto_hint)
        with pytest.raises(JobError, match="mask_image"):
            annotate(task, photo(), None)


class TestSentMaps:
    @pytest.mark.parametrize("control_type", [name for name, row in CONTROL_TYPES.items() if not row.needs_mask])
    def test_with_auto_hint_off_the_picture_is_the_map(self, control_type: str) -> None:
        sent = made("canny", photo(), (128, 96))
        same, info = annotate(
            AnnotationTask(control_type=control_type, width=128, height=96, auto_hint=False), sent, None
        )
        assert info.annotator == "none"
        assert np.array_equal(same, sent)
        resized, _ = annotate(
            AnnotationTask(control_type=control_type, width=300, height=200, auto_hint=False), sent, None
        )
        assert resized.shape == (200, 300, 3)
        if CONTROL_TYPES[control_type].lines:
            assert set(np.unique(resized)) == {0, 255}

    def test_the_annotator_none_is_a_sent_map(self) -> None:
        sent = made("canny", photo(), (128, 96))
        task = AnnotationTask(control_type="depth", annotator="none", width=128, height=96)
        same, info = annotate(task, sent, None)
        assert info.annotator == "none"
        assert np.array_equal(same, sent)

    def test_a_negative_of_a_drawing_is_a_map_of_its_lines(self) -> None:
        task = AnnotationTask(control_type="lineart", annotator="invert", width=128, height=96)
        drawing = 255 - made("canny", photo(), (128, 96))
        inverted, info = annotate(task, drawing, None)
        assert info.annotator == "invert"
        assert np.array_equal(inverted, 255 - drawing)

    def test_an_annotator_of_another_type_is_answered_with_this_types(self) -> None:
        task = AnnotationTask(control_type="depth", annotator="canny", width=64, height=64)
        with pytest.raises(AnnotatorUnavailable, match="depth_anything_v2, midas, zoe, leres, none"):
            annotate(task, photo(), None)

    @pytest.mark.parametrize("control_type", sorted(set(CONTROL_TYPES) - set(WEIGHTLESS)))
    def test_a_detector_without_a_host_says_so(self, control_type: str) -> None:
        with pytest.raises(AnnotatorUnavailable, match="no detector networks"):
            annotate(AnnotationTask(control_type=control_type, width=64, height=64), photo(), None)

    def test_an_unknown_type_is_answered_with_the_known_ones(self) -> None:
        with pytest.raises(AnnotatorUnavailable, match="canny"):
            annotate(AnnotationTask(control_type="cany", width=64, height=64, auto_hint=False), photo(), None)


class TestEmpty:
    @staticmethod
    def is_empty(control_type: str, image: ImageArray, auto_hint: bool = True, mask: ImageArray | None = None) -> bool:
        task = AnnotationTask(control_type=control_type, width=128, height=96, auto_hint=auto_hint)
        return annotate(task, image, mask)[1].empty

    @pytest.mark.parametrize("control_type", ["canny", "scribble", "lineart", "tile", "shuffle"])
    def test_a_blank_photo_guides_nothing(self, control_type: str) -> None:
        for level in (0, 128, 255):
            assert self.is_empty(control_type, np.full((50, 60, 3), level, np.uint8))
        assert not self.is_empty(control_type, photo())

    def test_a_blank_map_guides_nothing(self) -> None:
        assert self.is_empty("openpose", np.zeros((50, 60, 3), np.uint8), auto_hint=False)
        assert not self.is_empty("openpose", photo(), auto_hint=False)

    def test_a_mask_without_a_hole_guides_nothing(self) -> None:
        assert self.is_empty("inpaint", photo(), mask=np.zeros((50, 60), np.uint8))
        assert not self.is_empty("inpaint", photo(), mask=hole())
