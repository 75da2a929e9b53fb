"""People are drawn as the library draws that the ControlNets' training data was made with: OpenPose's and DWPose's."""

import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve_app.annotators import pose
from serve_app.annotators.skeleton import Points, blank, draw_body, draw_face, draw_hand
from serve_app.annotators.source import Annotator, Source
from serve_app.tasks import ControlMap, ImageArray
from support.detectors import Detectors, Planted, reference_library
from support.people import PERSON, PlantedBody

SIZES = [(96, 128), (333, 200)]


def points(count: int, seed: int, missing: tuple[int, ...] = ()) -> Points:
    random = np.random.default_rng(seed)
    return [None if index in missing else tuple(random.uniform(0.05, 0.95, 2).tolist()) for index in range(count)]


@pytest.fixture(scope="module")
def library() -> Iterator[ModuleType]:
    """controlnet_aux; its drawing wants one function of matplotlib, which is slow to import."""
    colors: Any = SimpleNamespace(hsv_to_rgb=hsv_to_rgb)
    with reference_library() as package, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", SimpleNamespace(colors=colors))
        yield package


@pytest.fixture(scope="module")
def openpose(library: ModuleType) -> ModuleType:
    return importlib.import_module(f"{library.__name__}.open_pose")


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
    def test_bodies(self, openpose: ModuleType, height: int, width: int, seed: int) -> None:
        body = points(18, seed, missing=(3, 16) if seed % 2 else ())
        ours = blank(height, width)
        draw_body(ours, body)
        assert np.array_equal(ours, openpose.util.draw_bodypose(blank(height, width), keypoints(openpose, body)))
        assert ours.any()

    def test_hands(self, openpose: ModuleType, height: int, width: int, seed: int) -> None:
        hand = [*points(18, seed), (0.5 / width, 0.4), (0.4, 0.5 / height), (-1 / width, -1 / height)]
        ours = blank(height, width)
        draw_hand(ours, hand)
        assert np.array_equal(ours, openpose.util.draw_handpose(blank(height, width), keypoints(openpose, hand)))
        assert ours.any()

    def test_faces(self, openpose: ModuleType, height: int, width: int, seed: int) -> None:
        face = [*points(70, seed), (0.5 / width, 0.5)]
        ours = blank(height, width)
        draw_face(ours, face)
        assert np.array_equal(ours, openpose.util.draw_facepose(blank(height, width), keypoints(openpose, face)))
        assert ours.any()


def keypoints(openpose: ModuleType, found: Points) -> list[Any]:
    return [None if point is None else openpose.Keypoint(*point) for point in found]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("missing", [(), (0, 4, 11)])
def test_dwpose_draws_the_same(library: ModuleType, height: int, width: int, missing: tuple[int, ...]) -> None:
    """Its form: two people beside each other, what was not found is -1, and limbs are dimmed with the whole picture."""
    dwpose = importlib.import_module(f"{library.__name__}.dwpose")
    bodies = [within(points(18, seed, missing), seed * 0.5, seed * 0.5 + 0.45) for seed in (0, 1)]
    hands = [within(points(21, seed), 0.0, 0.9) for seed in range(4, 8)]
    faces = [within(points(68, seed), 0.1, 1.0) for seed in (8, 9)]
    hands[0][3] = faces[1][7] = (-1.0, -1.0)
    flat = [(-1.0, -1.0) if point is None else point for body in bodies for point in body]
    subset = [[18 * person + index if index not in missing else -1 for index in range(18)] for person in (0, 1)]
    drawing = {"bodies": {"candidate": flat, "subset": subset}, "hands": np.array(hands), "faces": np.array(faces)}
    ours = blank(height, width)
    for body in bodies:
        draw_body(ours, body)
    for hand in hands:
        draw_hand(ours, hand)
    for face in faces:
        draw_face(ours, face)
    assert np.array_equal(ours, dwpose.draw_pose(drawing, height, width))


def within(found: Points, left: float, right: float) -> list[Any]:
    """The same points in a part of the picture's width."""
    return [None if point is None else (left + point[0] * (right - left), point[1]) for point in found]


def test_a_hand_with_gaps_is_drawn_without_them() -> None:
    canvas = blank(64, 64)
    draw_hand(canvas, [None] * 21)
    assert not canvas.any()
    draw_hand(canvas, [(0.5, 0.5), *[None] * 20])
    assert (canvas[32, 32] == (0, 0, 255)).all()


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


def hand_answer(pixels: torch.Tensor) -> torch.Tensor:
    """21 joints at places of their own, but for one that is not seen."""
    return blobs(22, pixels.shape[2] // 8, pixels.shape[3] // 8, hidden=5)


def face_answer(pixels: torch.Tensor) -> list[torch.Tensor]:
    return [blobs(71, pixels.shape[2] // 8, pixels.shape[3] // 8, hidden=9)]


def blobs(count: int, height: int, width: int, hidden: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    places = np.random.default_rng(count).uniform(0.1, 0.9, (count, 2)).tolist()
    heat = torch.stack([torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 0.01) for x, y in places])
    heat[hidden] = 0
    return heat[None]


@pytest.mark.parametrize("size", [1.0, 0.3])
@pytest.mark.parametrize(
    ("ours", "hands", "faces"),
    [(pose.body, False, False), (pose.hand, True, False), (pose.face, False, True), (pose.full, True, True)],
)
def test_openpose_finds_and_draws_the_same(
    openpose: ModuleType, ours: Annotator, hands: bool, faces: bool, size: float
) -> None:
    """OpenposeDetector with the same networks; a small person's hands and face are looked for by neither."""
    person = [None if point is None else (point[0] * size, point[1] * size) for point in PERSON]
    networks: dict[str, Any] = {
        "openpose_body": PlantedBody(person),
        "openpose_hand": Planted(hand_answer),
        "openpose_face": Planted(face_answer),
    }
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = drawn_by(openpose, networks, image, hands, faces)
    shown = [networks[name].seen for name in ("openpose_hand", "openpose_face")]
    for name in ("openpose_hand", "openpose_face"):
        networks[name].seen = None
    assert np.array_equal(ours(Source(image, None, 0, {"resolution": 0}, networks)), expected)
    for name, theirs, wanted in zip(("openpose_hand", "openpose_face"), shown, (hands, faces), strict=True):
        seen = networks[name].seen
        assert (seen is not None) == (theirs is not None) == (wanted and size == 1)
        assert seen is None or torch.equal(seen, theirs)
    assert (expected == 255).all(axis=2).any() == (faces and size == 1)  # a face's points are white


def test_hands_and_faces_of_a_crowd_are_those_of_the_largest() -> None:
    """Nine people in a row, of whom the last is smaller."""
    seen: list[int] = []

    def count(pixels: torch.Tensor) -> list[torch.Tensor]:
        seen.append(pixels.shape[2])
        return face_answer(pixels)

    sizes = [0.65] * pose.CLOSE_UPS + [0.6]
    people = [
        [None if point is None else ((index + point[0] * size * 2) / 9, point[1] * size) for point in PERSON]
        for index, size in enumerate(sizes)
    ]
    networks = {"openpose_body": PlantedBody(*people), "openpose_face": Planted(count)}
    image = np.full((256, 1024, 3), 90, np.uint8)
    source = Source(image, None, 0, {"resolution": 0}, networks)
    drawn, bodies = pose.face(source), pose.body(source)
    assert len(seen) == pose.CLOSE_UPS
    wrists = (bodies == (170, 255, 0)).all(axis=2).astype(np.uint8)
    assert cv2.connectedComponents(wrists)[0] - 1 == len(people)
    last = slice(1024 * pose.CLOSE_UPS // 9, None)
    assert np.array_equal(drawn[:, last], bodies[:, last])
    assert not np.array_equal(drawn, bodies)


@pytest.mark.full
def test_real_networks_find_and_draw_the_same(openpose: ModuleType, detectors: Detectors) -> None:
    """Hands and a face as the networks of full size with random weights see them."""
    for name in ("openpose_hand", "openpose_face"):
        detectors.need(name)
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    with detectors.host.lease(("openpose_hand", "openpose_face")) as loaded:
        networks = {**loaded, "openpose_body": PlantedBody(PERSON)}
        ours = pose.full(Source(image, None, 0, {"resolution": 0}, networks))
        assert np.array_equal(ours, drawn_by(openpose, networks, image, hands=True, faces=True))


def drawn_by(
    openpose: ModuleType, networks: Mapping[str, Any], image: ImageArray, hands: bool, faces: bool
) -> ControlMap:
    kinds = {"openpose_body": openpose.Body, "openpose_hand": openpose.Hand, "openpose_face": openpose.Face}
    finders = {name: object.__new__(kind) for name, kind in kinds.items()}
    for name, finder in finders.items():
        finder.model = networks[name]
    detector = openpose.OpenposeDetector(*finders.values())
    drawn: ControlMap = detector(image, 256, 256, include_hand=hands, include_face=faces, output_type="np")
    return drawn
