"""Faces and classes have the colours that the ControlNets learned: the library's own drawing, and published lists."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from serve_app.annotators import segmentation
from serve_app.annotators.face import draw_contours, mediapipe_face
from serve_app.annotators.skeleton import blank
from serve_app.annotators.source import Source
from serve_app.tasks import ControlMap
from support.detectors import TASK, Landmarks, Looking, confident, fake_mediapipe

# face_mesh_connections.py of MediaPipe 0.10: the connections of each part of a face, in the order of the file.
LIPS = (
    *((61, 146), (146, 91), (91, 181), (181, 84), (84, 17), (17, 314), (314, 405), (405, 321), (321, 375), (375, 291)),
    *((61, 185), (185, 40), (40, 39), (39, 37), (37, 0), (0, 267), (267, 269), (269, 270), (270, 409), (409, 291)),
    *((78, 95), (95, 88), (88, 178), (178, 87), (87, 14), (14, 317), (317, 402), (402, 318), (318, 324), (324, 308)),
    *((78, 191), (191, 80), (80, 81), (81, 82), (82, 13), (13, 312), (312, 311), (311, 310), (310, 415), (415, 308)),
)
LEFT_EYE = (
    *((263, 249), (249, 390), (390, 373), (373, 374), (374, 380), (380, 381), (381, 382), (382, 362)),
    *((263, 466), (466, 388), (388, 387), (387, 386), (386, 385), (385, 384), (384, 398), (398, 362)),
)
LEFT_EYEBROW = (
    *((276, 283), (283, 282), (282, 295), (295, 285)),
    *((300, 293), (293, 334), (334, 296), (296, 336)),
)
RIGHT_EYE = (
    *((33, 7), (7, 163), (163, 144), (144, 145), (145, 153), (153, 154), (154, 155), (155, 133)),
    *((33, 246), (246, 161), (161, 160), (160, 159), (159, 158), (158, 157), (157, 173), (173, 133)),
)
RIGHT_EYEBROW = (
    *((46, 53), (53, 52), (52, 65), (65, 55)),
    *((70, 63), (63, 105), (105, 66), (66, 107)),
)
FACE_OVAL = (
    *((10, 338), (338, 297), (297, 332), (332, 284), (284, 251), (251, 389), (389, 356), (356, 454), (454, 323)),
    *((323, 361), (361, 288), (288, 397), (397, 365), (365, 379), (379, 378), (378, 400), (400, 377), (377, 152)),
    *((152, 148), (148, 176), (176, 149), (149, 150), (150, 136), (136, 172), (172, 58), (58, 132), (132, 93)),
    *((93, 234), (234, 127), (127, 162), (162, 21), (21, 54), (54, 103), (103, 67), (67, 109), (109, 10)),
)


def old_mediapipe(found: list[Landmarks]) -> Any:
    """What the library uses of mediapipe < 0.10.30, with the drawing of its ``drawing_utils``."""

    class FaceMesh:
        def __init__(self, *, max_num_faces: int, min_detection_confidence: float, **_: bool) -> None:
            self.limits = min_detection_confidence, max_num_faces

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def process(self, _: ControlMap) -> SimpleNamespace:
            faces = [
                SimpleNamespace(landmark=[SimpleNamespace(x=x, y=y, HasField=lambda _: False) for x, y in face])
                for face in confident(found, *self.limits)
            ]
            return SimpleNamespace(multi_face_landmarks=faces or None)

    def draw_landmarks(
        image: ControlMap, face: SimpleNamespace, connections: Any, connection_drawing_spec: Any, **_: None
    ) -> None:
        height, width = image.shape[:2]
        for start, end in connections:
            ends = [face.landmark[start], face.landmark[end]]
            if all(0 <= point.x <= 1 and 0 <= point.y <= 1 for point in ends):
                first, last = ((min(int(p.x * width), width - 1), min(int(p.y * height), height - 1)) for p in ends)
                spec = connection_drawing_spec[start, end]
                cv2.line(image, first, last, spec.color, spec.thickness)

    module: Any = ModuleType("mediapipe")
    parts = {"FACEMESH_LIPS": LIPS, "FACEMESH_LEFT_EYE": LEFT_EYE, "FACEMESH_LEFT_EYEBROW": LEFT_EYEBROW}
    parts |= {"FACEMESH_RIGHT_EYE": RIGHT_EYE, "FACEMESH_RIGHT_EYEBROW": RIGHT_EYEBROW}
    none: frozenset[int] = frozenset()
    module.solutions = SimpleNamespace(
        drawing_utils=SimpleNamespace(draw_landmarks=draw_landmarks),
        drawing_styles=SimpleNamespace(DrawingSpec=SimpleNamespace, PoseLandmark=None),
        face_detection=None,
        face_mesh=SimpleNamespace(FaceMesh=FaceMesh, FACEMESH_FACE_OVAL=FACE_OVAL, **parts),
        face_mesh_connections=SimpleNamespace(FACEMESH_TESSELATION=none),
        hands_connections=SimpleNamespace(HAND_CONNECTIONS=none),
        pose_connections=SimpleNamespace(POSE_CONNECTIONS=none),
    )
    return module


def drawn_by_library(
    monkeypatch: pytest.MonkeyPatch, found: list[Landmarks], image: ControlMap, most: int, least: float
) -> ControlMap:
    """``generate_annotation`` of controlnet-aux: the training code of CrucibleAI's net."""
    package = importlib.util.find_spec("controlnet_aux")
    assert package is not None
    assert package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/mediapipe_face/mediapipe_face_common.py"
    spec = importlib.util.spec_from_file_location("face_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mediapipe", old_mediapipe(found))
        spec.loader.exec_module(module)
        drawn: ControlMap = module.generate_annotation(image, most, least)
    return drawn


def face(seed: int, left: float, top: float, width: float, height: float) -> Landmarks:
    """478 points at random in a rectangle, two of them in its corners."""
    points = np.random.default_rng(seed).uniform(0, 1, (478, 2))
    points[200], points[300] = (0, 0), (1, 1)
    return [(float(left + x * width), float(top + y * height)) for x, y in points]


FACES = [face(0, 0.0, 0.1, 0.5, 0.6), face(1, 0.25, 0.0, 0.75, 1.0), face(2, -0.1, 0.4, 1.3, 0.8)]
FACES.append(face(3, 0.5, 0.5, 0.45, 0.4))


class TestFaces:
    @pytest.mark.parametrize(("width", "height"), [(200, 333), (256, 256)])
    @pytest.mark.parametrize(("most", "least"), [(1, 0.5), (2, 0.5), (10, 0.1), (10, 0.8), (1, 0.99)])
    def test_as_the_library_draws_them(
        self, monkeypatch: pytest.MonkeyPatch, width: int, height: int, most: int, least: float
    ) -> None:
        image = np.zeros((height, width, 3), np.uint8)
        expected = drawn_by_library(monkeypatch, FACES, image, most, least)
        ours = self.drawn(monkeypatch, FACES, image, most, least)
        assert np.array_equal(ours, expected)
        assert ours.any() == (least < 0.95)

    @pytest.mark.parametrize(("side", "drawn"), [(63.9, False), (64.1, True)])
    @pytest.mark.parametrize("across", [True, False])
    def test_faces_of_fewer_than_64_pixels_are_left_out(
        self, monkeypatch: pytest.MonkeyPatch, side: float, drawn: bool, across: bool
    ) -> None:
        image = np.zeros((160, 200, 3), np.uint8)
        size = (side / 200, 0.8) if across else (0.8, side / 160)
        found = [[], face(4, 0.1, 0.1, *size)]
        assert self.drawn(monkeypatch, found, image).any() == drawn
        assert drawn_by_library(monkeypatch, found, image, 1, 0.5).any() == drawn

    def test_their_size_is_judged_where_they_are_looked_for_and_they_are_drawn_at_the_outputs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half a picture of 160 is 80 pixels at its own size and 50 at a resolution of 100, across and down."""
        image = np.zeros((160, 160, 3), np.uint8)
        for size in ((0.5, 0.75), (0.75, 0.5)):
            assert not self.drawn(monkeypatch, [[], face(5, 0.2, 0.2, *size)], image, resolution=100).any()
        found = [[], face(5, 0.2, 0.2, 0.5, 0.75)]
        at_own_size = self.drawn(monkeypatch, found, image)
        assert at_own_size.any()
        assert np.array_equal(self.drawn(monkeypatch, found, image, resolution=140), at_own_size)

    @staticmethod
    def drawn(
        monkeypatch: pytest.MonkeyPatch,
        found: list[Landmarks],
        image: ControlMap,
        most: int = 1,
        least: float = 0.5,
        resolution: int = 0,
    ) -> ControlMap:
        params = {"resolution": resolution, "max_faces": most, "min_confidence": least}
        monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe(lambda _: found))
        return mediapipe_face(Source(image, None, 0, params, {"face_landmarker": TASK}))

    # MediaPipe's sides are the person's. Red and blue are swapped against the constants of the training code, which
    # drew in BGR: what is right in them, (10, 200, 180), came out as (180, 200, 10).
    COLOURS = (
        (RIGHT_EYE, (180, 200, 10)),
        (LEFT_EYE, (10, 200, 180)),
        (RIGHT_EYEBROW, (180, 220, 10)),
        (LEFT_EYEBROW, (10, 220, 180)),
        (LIPS, (10, 180, 10)),
        (FACE_OVAL, (10, 200, 10)),
    )

    @pytest.mark.parametrize(("connections", "colour"), COLOURS)
    def test_each_connection_has_its_parts_colour(
        self, connections: tuple[tuple[int, int], ...], colour: tuple[int, int, int]
    ) -> None:
        for start, end in connections:
            landmarks = [(-1.0, -1.0)] * 478
            landmarks[start], landmarks[end] = (0.2, 0.5), (0.8, 0.5)
            canvas = blank(50, 50)
            draw_contours(canvas, landmarks)
            assert (canvas[25, 10:41] == colour).all()
            assert {tuple(pixel) for pixel in canvas[canvas.any(axis=2)].tolist()} == {colour}

    def test_nothing_else_is_connected(self) -> None:
        connected = {frozenset(pair) for connections, _ in self.COLOURS for pair in connections}
        assert len(connected) == 36 + 16 + 8 + 16 + 8 + 40
        from serve_app.annotators.face import _CONTOURS

        assert {frozenset(pair) for _, pairs in _CONTOURS for pair in pairs} == connected
        assert sum(len(pairs) for _, pairs in _CONTOURS) == len(connected)

    @pytest.mark.parametrize("x", [0.0, 0.005, 0.25, 0.995, 1.0])
    def test_irises_are_squares_within_the_picture(self, x: float) -> None:
        landmarks = [(-1.0, -1.0)] * 478
        landmarks[468], landmarks[473] = (x, 0.01), (x, 0.75)
        canvas = blank(100, 100)
        draw_contours(canvas, landmarks)
        column = int(x * 100)
        columns = slice(max(0, column - 2), column + 2)
        for row, colour in ((1, (250, 200, 10)), (75, (10, 200, 250))):
            square = np.zeros((100, 100), bool)
            square[max(0, row - 2) : row + 2, columns] = x < 1
            assert np.array_equal((canvas == colour).all(axis=2), square)


ADE20K = {
    0: ("wall", (120, 120, 120)),
    1: ("building", (180, 120, 120)),
    2: ("sky", (6, 230, 230)),
    3: ("floor", (80, 50, 50)),
    4: ("tree", (4, 200, 3)),
    5: ("ceiling", (120, 120, 80)),
    6: ("road", (140, 140, 140)),
    7: ("bed", (204, 5, 255)),
    8: ("windowpane", (230, 230, 230)),
    9: ("grass", (4, 250, 7)),
    10: ("cabinet", (224, 5, 255)),
    11: ("sidewalk", (235, 255, 7)),
    12: ("person", (150, 5, 61)),
    13: ("earth", (120, 120, 70)),
    14: ("door", (8, 255, 51)),
    15: ("table", (255, 6, 82)),
    16: ("mountain", (143, 255, 140)),
    17: ("plant", (204, 255, 4)),
    18: ("curtain", (255, 51, 7)),
    19: ("chair", (204, 70, 3)),
    20: ("car", (0, 102, 200)),
    21: ("water", (61, 230, 250)),
    26: ("sea", (9, 7, 230)),
    149: ("flag", (92, 0, 255)),
}
"""Colours of classes as the data set publishes them (its color150), by index from 0."""


class Classes(Looking):
    """A segmenter that sees one class in each square of 8 x 8."""

    def __init__(self, classes: NDArray[np.int_], count: int = 150) -> None:
        super().__init__()
        self.labels = torch.from_numpy(classes.repeat(8, axis=0).repeat(8, axis=1))
        self.count = count

    def forward(self, pixels: torch.Tensor, **_: object) -> SimpleNamespace:
        labels = torch.zeros(pixels.shape[2:], dtype=torch.long)
        labels[: self.labels.shape[0], : self.labels.shape[1]] = self.labels
        return SimpleNamespace(logits=torch.nn.functional.one_hot(labels, self.count).permute(2, 0, 1)[None].float())


class TestClasses:
    def test_they_have_the_colours_of_ade20k(self) -> None:
        classes = np.arange(150).reshape(10, 15)
        painted = self.painted(Classes(classes))
        for index, (name, colour) in ADE20K.items():
            row, column = divmod(index, 15)
            assert (painted[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] == colour).all(), name
        colours = [tuple(painted[8 * row, 8 * column].tolist()) for row in range(10) for column in range(15)]
        assert len(set(colours)) == 149  # road and escalator share one in the data set, too
        assert [index for index, colour in enumerate(colours) if colour == (140, 140, 140)] == [6, 48]

    def test_more_classes_than_colours_are_refused(self) -> None:
        from serve_app.errors import ModelLoadFailed

        self.painted(Classes(np.zeros((10, 15), np.int64), 149))
        with pytest.raises(ModelLoadFailed, match="151 classes, ADE20K has 150"):
            self.painted(Classes(np.zeros((10, 15), np.int64), 151))

    @staticmethod
    def painted(network: Classes) -> ControlMap:
        image = np.zeros((80, 120, 3), np.uint8)
        return segmentation.upernet(Source(image, None, 0, {"resolution": 0}, {"upernet": network}))
