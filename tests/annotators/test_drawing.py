"""Skeletons, faces and classes are drawn as the libraries draw that the ControlNets' training data was made with."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve_app.annotators import pose, segmentation
from serve_app.annotators.face import draw_contours
from serve_app.annotators.isolation import part
from serve_app.annotators.skeleton import Points, blank, draw_body, draw_face, draw_hand
from serve_app.annotators.source import Source
from support.detectors import Detectors

SIZES = [(96, 128), (333, 200)]


def points(count: int, seed: int, missing: tuple[int, ...] = ()) -> Points:
    random = np.random.default_rng(seed)
    return [None if index in missing else tuple(random.uniform(0.05, 0.95, 2).tolist()) for index in range(count)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The drawing functions of controlnet-aux; they want one function of matplotlib, which is not installed."""
    colors: Any = SimpleNamespace(hsv_to_rgb=hsv_to_rgb)
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(colors=colors))
    return part("open_pose.util")


def hsv_to_rgb(hsv: list[float]) -> NDArray[np.float64]:
    """For full saturation and value: up and down between the primaries, in six parts."""
    sector, up = int(hsv[0] * 6), hsv[0] * 6 - int(hsv[0] * 6)
    down = 1 - up
    up = 1 - down
    ramps = [(1, up, 0), (down, 1, 0), (0, 1, up), (0, down, 1), (up, 0, 1), (1, 0, down)]
    return np.array(ramps[sector], np.float64)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("seed", range(4))
class TestSkeleton:
    def test_bodies(self, library: ModuleType, height: int, width: int, seed: int) -> None:
        body = points(18, seed, missing=(3, 16) if seed % 2 else ())
        ours = blank(height, width)
        draw_body(ours, body)
        assert np.array_equal(ours, library.draw_bodypose(blank(height, width), keypoints(body)))
        assert ours.any()

    def test_hands(self, library: ModuleType, height: int, width: int, seed: int) -> None:
        hand = [*points(20, seed), (-1 / width, -1 / height)]
        ours = blank(height, width)
        draw_hand(ours, hand)
        assert np.array_equal(ours, library.draw_handpose(blank(height, width), keypoints(hand)))
        assert ours.any()

    def test_faces(self, library: ModuleType, height: int, width: int, seed: int) -> None:
        face = points(70, seed)
        ours = blank(height, width)
        draw_face(ours, face)
        assert np.array_equal(ours, library.draw_facepose(blank(height, width), keypoints(face)))
        assert ours.any()


def keypoints(found: Points) -> list[Any]:
    kind = part("open_pose.body").Keypoint
    return [None if point is None else kind(*point) for point in found]


def test_a_hand_with_gaps_is_drawn_without_them() -> None:
    canvas = blank(64, 64)
    draw_hand(canvas, [None] * 21)
    assert not canvas.any()
    draw_hand(canvas, [(0.5, 0.5), *[None] * 20])
    assert (canvas[32, 32] == (0, 0, 255)).all()


class PlantedBody(torch.nn.Module):
    """A body network that sees one person: peaks and limbs where the joints are, at an eighth of its input."""

    def __init__(self, joints: Points) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.joints = joints

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = pixels.shape[2] // 8, pixels.shape[3] // 8
        heat, fields = torch.zeros(1, 19, height, width), torch.zeros(1, 38, height, width)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = [None if joint is None else (joint[0] * width - 0.5, joint[1] * height - 0.5) for joint in self.joints]
        for index, place in enumerate(places):
            if place is not None:
                heat[0, index] = torch.exp(-((columns - place[0]) ** 2 + (rows - place[1]) ** 2) / 2)
        for (first, second), (across, down) in zip(LIMBS, FIELDS, strict=True):
            start, end = places[first - 1], places[second - 1]
            if start is not None and end is not None:
                length = max(1e-6, float(np.hypot(end[0] - start[0], end[1] - start[1])))
                fields[0, across - 19] = (end[0] - start[0]) / length
                fields[0, down - 19] = (end[1] - start[1]) / length
        return fields, heat


# Limbs and their channels as in OpenPose's model; joints count from 1, channels from 19.
LIMBS = [(2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11), (2, 12), (12, 13), (13, 14)]
LIMBS += [(2, 1), (1, 15), (15, 17), (1, 16), (16, 18), (3, 17), (6, 18)]
FIELDS = [(31, 32), (39, 40), (33, 34), (35, 36), (41, 42), (43, 44), (19, 20), (21, 22), (23, 24), (25, 26)]
FIELDS += [(27, 28), (29, 30), (47, 48), (49, 50), (53, 54), (51, 52), (55, 56), (37, 38), (45, 46)]
PERSON: Points = [
    *((0.5, 0.2), (0.5, 0.35), (0.38, 0.35), (0.3, 0.5), (0.26, 0.65), (0.62, 0.35), (0.7, 0.5), (0.74, 0.65)),
    *((0.42, 0.62), (0.4, 0.78), (0.4, 0.92), (0.58, 0.62), (0.6, 0.78), (0.6, 0.92)),
    *((0.46, 0.16), (0.54, 0.16), (0.42, 0.19), (0.58, 0.19)),
]


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 256), (448, 96)])
def test_a_person_is_found_and_drawn_in_its_place(width: int, height: int) -> None:
    """The joints that are drawn are those that were planted, within half a cell of the network's grid."""
    padded = max(height, width // 4) / height  # the strip is continued below, so the network sees it this much higher
    seen = [None if joint is None else (joint[0], joint[1] / padded) for joint in PERSON]
    image = np.full((height, width, 3), 90, np.uint8)
    source = Source(image, None, 0, {"resolution": 0}, {"openpose_body": PlantedBody(seen)})
    drawn = pose.body(source)
    assert drawn.shape == (height, width, 3)
    cell = 8 * max(height, width // 4) / 184
    for joint, colour in ((4, (170, 255, 0)), (7, (0, 255, 85)), (10, (0, 170, 255)), (13, (85, 0, 255))):
        place = PERSON[joint]
        assert place is not None
        found = np.argwhere((drawn == colour).all(axis=2)).mean(axis=0)
        assert abs(found[1] - place[0] * width) <= max(2, cell / 2)
        assert abs(found[0] - place[1] * height) <= max(2, cell / 2)


def test_nobody_is_an_empty_map() -> None:
    source = Source(np.zeros((64, 64, 3), np.uint8), None, 0, {"resolution": 0}, {})
    object.__setattr__(source, "networks", {"openpose_body": PlantedBody([None] * 18)})
    assert not pose.body(source).any()


@pytest.mark.full
def test_hands_and_face_of_a_person_are_drawn(detectors: Detectors) -> None:
    """Through the real networks with random weights: whatever they find lies where the person is."""
    for name in ("openpose_hand", "openpose_face"):
        detectors.need(name)
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    with detectors.host.lease(("openpose_hand", "openpose_face")) as loaded:
        networks = {**loaded, "openpose_body": PlantedBody(PERSON)}
        maps = [draw(Source(image, None, 0, {"resolution": 0}, networks)) for draw in (pose.body, pose.full)]
    assert np.array_equal(maps[0], pose.body(Source(image, None, 0, {"resolution": 0}, networks)))
    assert maps[1].shape == (256, 256, 3)


class TestFace:
    # MediaPipe's sides are the person's, the table's are the viewer's.
    COLOURS = (
        ((33, 7), (180, 200, 10)),
        ((263, 249), (10, 200, 180)),
        ((46, 53), (180, 220, 10)),
        ((276, 283), (10, 220, 180)),
        ((61, 146), (10, 180, 10)),
        ((10, 338), (10, 200, 10)),
    )

    @pytest.mark.parametrize(("connection", "colour"), COLOURS)
    def test_a_contour_has_its_colour(self, connection: tuple[int, int], colour: tuple[int, int, int]) -> None:
        landmarks = [(-1.0, -1.0)] * 478
        landmarks[connection[0]], landmarks[connection[1]] = (0.2, 0.5), (0.8, 0.5)
        canvas = blank(100, 100)
        draw_contours(canvas, landmarks)
        assert {tuple(pixel) for pixel in canvas[canvas.any(axis=2)].tolist()} == {colour}
        assert canvas[50, 20:80].any(axis=1).all()

    def test_irises_are_squares(self) -> None:
        landmarks = [(-1.0, -1.0)] * 478
        landmarks[468], landmarks[473] = (0.25, 0.5), (0.75, 0.5)
        canvas = blank(100, 100)
        draw_contours(canvas, landmarks)
        assert (canvas[48:52, 23:27] == (250, 200, 10)).all()
        assert (canvas[48:52, 73:77] == (10, 200, 250)).all()
        assert canvas.any(axis=2).sum() == 32

    def test_the_table_has_all_contours_of_mediapipe(self) -> None:
        """Drawn on a ring, every connection is a chord of its own: their number and joints are MediaPipe's."""
        from serve_app.annotators.face import _CONTOURS

        chains = [connection for _, connections in _CONTOURS for connection in connections]
        assert len(chains) == len(set(chains)) == 36 + 16 + 8 + 16 + 8 + 40
        oval = _CONTOURS[0][1]
        assert all(first[1] == second[0] for first, second in pairwise(oval))
        assert oval[-1][1] == oval[0][0]


def test_classes_have_the_colours_of_ade20k() -> None:
    classes = np.arange(150).reshape(10, 15).repeat(8, axis=0).repeat(8, axis=1)

    class Planted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
            labels = torch.zeros(pixels.shape[2:], dtype=torch.long)
            labels[:80, :120] = torch.from_numpy(classes)
            return SimpleNamespace(logits=torch.nn.functional.one_hot(labels, 150).permute(2, 0, 1)[None].float())

    image = np.zeros((80, 120, 3), np.uint8)
    painted = segmentation.upernet(Source(image, None, 0, {"resolution": 0}, {"upernet": Planted()}))
    palette = np.array(part("util").ade_palette(), np.uint8)
    assert np.array_equal(painted, palette[classes])
    assert len({tuple(colour) for colour in palette.tolist()}) >= 149
    # The first and the last of the data set's own list: wall and flag.
    assert palette[0].tolist() == [120, 120, 120]
    assert palette[149].tolist() == [92, 0, 255]
