"""What becomes of a network's answer: polarity, levels, places and sizes, with networks whose answer is known."""

import math
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from serve_app.annotators import depth, lineart, segmentation, softedge
from serve_app.annotators.source import Annotator, Source
from serve_app.tasks import ControlMap
from support.detectors import Planted, reference_library

Answer = Callable[[Tensor], Any]
"""From a network's input to what it answers."""
PARAMS = {"safe": False, "remove_near": 0, "remove_background": 0, "value_threshold": 0.1, "distance_threshold": 0.1}


def made(
    detector: Annotator, name: str, answer: Answer, size: tuple[int, int], resolution: int = 0, **params: float
) -> ControlMap:
    image = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    source = Source(image, None, 0, {**PARAMS, "resolution": resolution, **params}, {name: Planted(answer)})
    return detector(source)


@pytest.fixture(scope="module")
def library() -> Iterator[ModuleType]:
    with reference_library() as package:
        yield package


def ramp(pixels: Tensor) -> Tensor:
    """(b, 1, h, w): 1 at the left border to 9 at the right one."""
    return torch.linspace(1, 9, pixels.shape[3]).expand(pixels.shape[0], 1, *pixels.shape[2:]).clone()


class TestDepth:
    """White is near: to the left where a network tells distance, to the right where it tells its inverse."""

    NETWORKS: tuple[tuple[Annotator, str, Answer, bool], ...] = (
        (depth.depth_anything, "depth_anything_v2", lambda x: SimpleNamespace(predicted_depth=ramp(x)[:, 0]), True),
        (depth.leres, "leres", ramp, False),
    )

    @pytest.mark.parametrize(("detector", "name", "answer", "inverse"), NETWORKS)
    @pytest.mark.parametrize(("size", "resolution"), [((128, 64), 0), ((200, 100), 64)])
    def test_near_is_white_and_far_is_black(
        self, detector: Annotator, name: str, answer: Answer, inverse: bool, size: tuple[int, int], resolution: int
    ) -> None:
        row = made(detector, name, answer, size, resolution)[size[1] // 2, :, 0]
        expected = np.linspace(0, 255, size[0])
        assert np.abs(row - (expected if inverse else expected[::-1])).max() <= 4
        assert {row[0], row[-1]} == {0, 255}

    def test_midas_is_inverse(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(depth, "midas_depth", lambda _, pixels: ramp(pixels)[:, 0])
        row = made(depth.midas, "midas", ramp, (128, 64))[32, :, 0]
        assert np.abs(row - np.linspace(0, 255, 128)).max() <= 1

    def test_zoe_is_the_librarys(self, library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        """From metres on: the 2nd percentile is white, the 85th and all beyond is black."""
        metres = torch.from_numpy(np.random.default_rng(2).gamma(2.0, 1.5, (1, 1, 128, 192)).astype(np.float32))
        monkeypatch.setattr(depth, "zoe_metres", lambda *_: metres.clone())
        ours = made(depth.zoe, "zoe", ramp, (192, 128))
        network = Planted(lambda _: metres.clone())
        photo = np.zeros((128, 192, 3), np.uint8)
        theirs = library.ZoeDetector(network)(photo, detect_resolution=128, image_resolution=128)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        places = np.argsort(metres.ravel().numpy())
        assert ours[:, :, 0].ravel()[places[0]] == 255
        assert ours[:, :, 0].ravel()[places[-1]] == 0

    @pytest.mark.parametrize(("near", "background"), [(0, 0), (30, 0), (0, 25), (40, 40), (100, 0), (0, 100)])
    def test_leres_cuts_what_the_library_cuts(self, library: ModuleType, near: float, background: float) -> None:
        ours = made(depth.leres, "leres", ramp, (512, 64), remove_near=near, remove_background=background)
        detector = library.LeresDetector(Planted(ramp), None)
        theirs = detector(
            np.zeros((64, 512, 3), np.uint8),
            near,
            background,
            detect_resolution=64,
            image_resolution=64,
            output_type="np",
        )
        off = np.abs(ours.astype(int) - theirs).max(axis=(0, 2))
        assert (off > 2).sum() <= 2  # the columns at the two limits: the library compares bytes
        assert not near or (ours[0, : 512 * int(near) // 100 - 2] == 255).all()
        assert not background or (ours[0, 514 - 512 * int(background) // 100 :] == 0).all()

    def test_one_depth_everywhere_is_one_level(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is divided by nothing; LeReS, inverted after it is stretched, is white as in the library."""

        def flat(pixels: Tensor) -> Tensor:
            return pixels[:, :1] * 0 + 3

        monkeypatch.setattr(depth, "zoe_metres", lambda _, pixels: flat(pixels))
        with np.errstate(all="raise"):
            anything = lambda pixels: SimpleNamespace(predicted_depth=flat(pixels)[0])  # noqa: E731
            assert (made(depth.depth_anything, "depth_anything_v2", anything, (64, 64)) == 0).all()
            assert (made(depth.zoe, "zoe", flat, (64, 64)) == 0).all()
            assert (made(depth.leres, "leres", flat, (64, 64)) == 255).all()

    def test_normals_keep_their_axes(self) -> None:
        """x to red, y to green, z to blue; -1 to 0 and 1 to 255, what is beyond is cut."""
        normal = torch.tensor([-1.0, 0.2, 2.0, 5.0]).view(1, 4, 1, 1)
        answer = lambda pixels: [[normal.expand(1, 4, *pixels.shape[2:])]]  # noqa: E731
        assert (made(depth.normal_bae, "normal_bae", answer, (64, 64)) == (0, 153, 255)).all()


def squares(height: int, width: int) -> NDArray[np.float32]:
    """Black and white at random, 0 and 1."""
    return np.random.default_rng(5).integers(0, 2, (height, width)).astype(np.float32)


def planted(pixels: Tensor) -> Tensor:
    return torch.from_numpy(squares(pixels.shape[2], pixels.shape[3]))[None, None]


class TestSizes:
    """Maps of lines grow by repeating pixels and shrink by averaging; smooth maps are resampled."""

    LINES: tuple[tuple[Annotator, str, Answer], ...] = (
        (softedge.hed, "hed", lambda x: [planted(x) * 200 - 100] * 5),
        (softedge.pidinet, "pidinet", lambda x: [planted(x) * 0, planted(x)]),
        (lineart.realistic, "lineart", lambda x: 1 - planted(x)),
        (lineart.coarse, "lineart_coarse", lambda x: 1 - planted(x)),
    )
    SMOOTH: tuple[tuple[Annotator, str, Answer], ...] = (
        (depth.depth_anything, "depth_anything_v2", lambda x: SimpleNamespace(predicted_depth=planted(x)[0])),
        (depth.leres, "leres", lambda x: 1 - planted(x)),
        (depth.normal_bae, "normal_bae", lambda x: [[(planted(x) * 2 - 1).expand(1, 4, -1, -1)]]),
    )

    @pytest.mark.parametrize(("detector", "name", "answer"), LINES)
    def test_lines(self, detector: Annotator, name: str, answer: Answer) -> None:
        levels = squares(64, 96) * 255
        grown = made(detector, name, answer, (192, 128), 64)
        assert np.array_equal(grown[:, :, 1], np.kron(levels, np.ones((2, 2))))
        shrunk = made(detector, name, answer, (96, 64), 128)
        means = squares(128, 192).reshape(64, 2, 96, 2).mean(axis=(1, 3)) * 255
        assert np.abs(shrunk[:, :, 1] - means).max() <= 1

    @pytest.mark.parametrize(("detector", "name", "answer"), SMOOTH)
    def test_smooth_maps(self, detector: Annotator, name: str, answer: Answer) -> None:
        levels = Image.fromarray((squares(64, 96) * 255).astype(np.uint8))
        expected = np.asarray(levels.resize((192, 128), Image.Resampling.LANCZOS))
        assert np.abs(made(detector, name, answer, (192, 128), 64)[:, :, 1].astype(int) - expected).max() <= 1

    def test_anime_lines(self) -> None:
        """Ink is where the network answers -1; it sees the picture continued to 256."""
        levels = squares(256, 256)[:64, :96]
        grown = made(lineart.anime, "lineart_anime", lambda x: 1 - 2 * planted(x), (192, 128), 64)
        assert np.array_equal(grown[:, :, 0], np.kron(levels, np.ones((2, 2))) * 255)
        grey = made(lineart.anime, "lineart_anime", lambda x: planted(x) * 0 + 0.5, (96, 64))
        assert set(np.unique(grey)) == {63}  # a quarter of the way from paper to ink

    def test_classes_have_no_class_between_them(self) -> None:
        """A border between wall (0) and flag (149) stays one, at its place, whatever size it is painted at."""

        def answer(pixels: Tensor) -> SimpleNamespace:
            logits = torch.zeros(1, 150, *pixels.shape[2:])
            logits[:, 0, :, :40] = 1
            logits[:, 149, :, 40:] = 1
            return SimpleNamespace(logits=logits)

        painted = made(segmentation.upernet, "upernet", answer, (333, 200), 64)
        border = round(40 * 333 / 107)  # the network looks at 107 x 64, continued to 128 x 64
        assert (painted[:, : border - 2] == (120, 120, 120)).all()
        assert (painted[:, border + 2 :] == (92, 0, 255)).all()
        assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2


class TestSoftEdges:
    def test_hed_averages_before_the_sigmoid(self) -> None:
        """Side outputs 8, 0, -1, 1 and 0 mean 1.6: sigmoid 0.832. The mean of the sigmoids would be 0.601."""
        sides = [8.0, 0.0, -1.0, 1.0, 0.0]
        answer = lambda x: [torch.full((1, 1, x.shape[2] // 2**i, x.shape[3] // 2**i), v) for i, v in enumerate(sides)]  # noqa: E731
        level = int(255 / (1 + math.exp(-1.6)))
        assert (made(softedge.hed, "hed", answer, (64, 64)) == level).all()

    @pytest.mark.parametrize(("level", "stepped"), [(0.2, 0), (0.34, 127), (0.6, 127), (0.67, 255), (1.0, 255)])
    def test_safe_has_three_levels(self, level: float, stepped: int) -> None:
        for safe, expected in ((False, int(255 * np.float32(level))), (True, stepped)):
            answer = lambda x: [torch.full((1, 1, *x.shape[2:]), level)]  # noqa: E731
            assert (made(softedge.pidinet, "pidinet", answer, (64, 64), safe=safe) == expected).all()

    def test_scribbles_are_the_librarys(self, library: ModuleType) -> None:
        """Thinned, widened, black and white: from soft edges that are the same on both sides."""
        blobs = cv2.GaussianBlur(np.random.default_rng(4).random((128, 192), np.float32), (0, 0), 4)
        edges = torch.from_numpy((blobs - blobs.min()) / np.ptp(blobs))[None, None]
        kinds: list[tuple[Annotator, str, Any, Answer]] = [
            (softedge.scribble_pidinet, "pidinet", library.PidiNetDetector, lambda _: [edges]),
            (softedge.scribble_hed, "hed", library.HEDdetector, lambda _: [torch.logit(edges, eps=1e-3)] * 5),
        ]
        for detector, name, kind, answer in kinds:
            ours = made(detector, name, answer, (192, 128))
            theirs = kind(Planted(answer))(np.zeros((128, 192, 3), np.uint8), 128, 128, scribble=True, output_type="np")
            assert set(np.unique(theirs)) == {0, 255}
            assert np.array_equal(ours, theirs)


class TestStraightLines:
    @staticmethod
    def answer(*lines: tuple[int, int, int, int, float]) -> Answer:
        """A network that sees lines, x, y, x, y in pixels of its input, each with a score."""

        def see(pixels: Tensor) -> Tensor:
            output = torch.full((1, 9, pixels.shape[2] // 2, pixels.shape[3] // 2), -20.0)
            for *ends, score in lines:
                x0, y0, x1, y1 = (one / 2 for one in ends)
                x, y = int((x0 + x1) / 2), int((y0 + y1) / 2)
                output[0, 0, y, x] = math.log(score / (1 - score))
                output[0, 1:5, y, x] = torch.tensor([x0 - x, y0 - y, x1 - x, y1 - y])
            return output

        return see

    @pytest.mark.parametrize(("size", "scale"), [((96, 64), (1, 1)), ((192, 128), (2, 2)), ((288, 192), (3, 3))])
    def test_they_are_drawn_at_the_outputs_size(self, size: tuple[int, int], scale: tuple[int, int]) -> None:
        """Found at a short side of 64; a pixel wide at any size, and as OpenCV draws it."""
        drawn = made(lineart.mlsd, "mlsd", self.answer((10, 8, 80, 50, 0.9)), size, 64)
        expected = np.zeros((size[1], size[0]), np.uint8)
        cv2.line(expected, (10 * scale[0], 8 * scale[1]), (80 * scale[0], 50 * scale[1]), 255, 1)
        assert np.array_equal(drawn[:, :, 0], expected)

    def test_both_axes_have_their_own_scale(self) -> None:
        drawn = made(lineart.mlsd, "mlsd", self.answer((4, 8, 100, 60, 0.9)), (333, 200), 64)
        expected = np.zeros((200, 333), np.uint8)
        start, end = ((x * 333 // 107, y * 200 // 64) for x, y in ((4, 8), (100, 60)))  # it looks at 107 x 64
        cv2.line(expected, start, end, 255, 1)
        assert np.array_equal(drawn[:, :, 0], expected)

    def test_faint_and_short_ones_are_left_out(self) -> None:
        answer = self.answer((10, 8, 80, 8, 0.9), (10, 30, 80, 30, 0.3), (10, 50, 22, 50, 0.9))
        for value, distance, rows in ((0.1, 0.1, [8, 30, 50]), (0.5, 0.1, [8, 50]), (0.1, 10, [8, 30])):
            drawn = made(lineart.mlsd, "mlsd", answer, (96, 64), 0, value_threshold=value, distance_threshold=distance)
            assert np.flatnonzero(drawn.any(axis=(1, 2))).tolist() == rows
