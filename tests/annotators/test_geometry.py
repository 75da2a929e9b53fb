"""Where a network's map lies: in place, at every size and resolution, whatever the network's stride is."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from serve_app.annotators import depth, lineart, softedge
from serve_app.annotators.geometry import LARGEST_AREA, at_resolution, look
from serve_app.annotators.source import Annotator, Source
from serve_app.images import resize_image
from serve_app.tasks import ImageArray

SIZES = [(512, 768), (768, 512), (64, 1024), (72, 136)]


class Seeing(torch.nn.Module):
    """A network whose map is its input's brightness, 0..1, in the form that a detector gives it."""

    config = SimpleNamespace(patch_size=14, backbone_config=SimpleNamespace(image_size=384))

    def __init__(self, form: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.form = form

    def forward(self, pixels: Tensor) -> Any:
        grey = pixels.mean(dim=1, keepdim=True)
        match self.form:
            case "hed":
                return [torch.logit((grey / 255).clamp(1e-4, 1 - 1e-4))] * 5
            case "pidinet":
                return [grey]
            case "lineart":
                return 1 - grey
            case "anime":
                return -grey
            case _:
                return SimpleNamespace(predicted_depth=grey[:, 0])


DETECTORS: dict[str, tuple[Annotator, str, str]] = {
    "hed": (softedge.hed, "hed", "hed"),
    "pidinet": (softedge.pidinet, "pidinet", "pidinet"),
    "realistic": (lineart.realistic, "lineart", "lineart"),
    "anime": (lineart.anime, "lineart_anime", "anime"),
    "depth_anything": (depth.depth_anything, "depth_anything_v2", "depth"),
}


def bars(width: int, height: int) -> ImageArray:
    """A bright rectangle on black, made at 333 x 517 and brought to the output's size as annotate does."""
    picture = np.zeros((333, 517, 3), np.uint8)
    picture[100:233, 150:400] = 255
    return resize_image(picture, width, height)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("resolution", [0, 256])
@pytest.mark.parametrize("name", DETECTORS)
def test_edges_are_at_most_a_pixel_off(name: str, resolution: int, width: int, height: int) -> None:
    detector, network, form = DETECTORS[name]
    params = {"resolution": resolution, "safe": False}
    image = bars(width, height)
    made = detector(Source(image, None, 0, params, {network: Seeing(form)}))
    assert made.shape == (height, width, 3)
    bright = made[:, :, 0] > 127
    rows, columns = np.flatnonzero(bright[:, width * 275 // 517]), np.flatnonzero(bright[height * 166 // 333])
    # A pixel of the detector's own grid is what can be told, where it looks at a smaller picture.
    grain = max(1.0, min(width, height) / resolution / 2 + 1 if resolution else 1.0)
    for found, size, full, first, last in ((rows, height, 333, 100, 233), (columns, width, 517, 150, 400)):
        assert abs(found.min() - first * size / full) <= grain
        assert abs(found.max() + 1 - last * size / full) <= grain


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 136), (1024, 64)])
@pytest.mark.parametrize("multiple", [4, 8, 32, 256])
def test_a_picture_is_continued_and_not_moved(multiple: int, width: int, height: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = look(Source(image, None, 0, {"resolution": 0}), Seeing("hed"), multiple)
    assert all(side % multiple == 0 for side in view.pixels.shape[2:])
    assert np.array_equal(view.pixels[0, :, :height, :width].permute(1, 2, 0).numpy(), image)
    assert np.array_equal(view.colour(view.pixels[0].permute(1, 2, 0).numpy() / 255), image)


def test_strips_do_not_grow_without_bound() -> None:
    strip = np.zeros((64, 1024, 3), np.uint8)
    looked_at = at_resolution(Source(strip, None, 0, {"resolution": 512}))
    assert looked_at.shape[0] * looked_at.shape[1] <= 4.1 * 512 * 512
    assert looked_at.shape[1] / looked_at.shape[0] == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize(("width", "height"), [(1024, 64), (64, 1024), (1024, 256), (1024, 512)])
def test_no_network_sees_more_than_the_largest_area(width: int, height: int) -> None:
    looked_at = at_resolution(Source(np.zeros((height, width, 3), np.uint8), None, 0, {"resolution": 1024}))
    assert looked_at.shape[0] * looked_at.shape[1] == pytest.approx(LARGEST_AREA, rel=0.01)
    assert looked_at.shape[1] / looked_at.shape[0] == pytest.approx(width / height, rel=0.02)


@given(
    width=st.integers(64, 2048),
    height=st.integers(64, 2048),
    resolution=st.just(0) | st.integers(64, 1024),
)
@example(width=1024, height=64, resolution=64)
@example(width=64, height=2048, resolution=64)
def test_no_side_gets_too_short_for_a_network(width: int, height: int, resolution: int) -> None:
    photo = np.zeros((height, width, 3), np.uint8)
    looked_at = at_resolution(Source(photo, None, 0, {"resolution": resolution}))
    assert min(looked_at.shape[:2]) >= 32


class PlantedLine(torch.nn.Module):
    """An M-LSD whose only line goes from one point to another, in pixels of its input."""

    def __init__(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.start, self.end = torch.tensor(start) / 2, torch.tensor(end) / 2

    def forward(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1] == 4
        output = torch.full((1, 9, pixels.shape[2] // 2, pixels.shape[3] // 2), -9.0)
        x, y = ((self.start + self.end) / 2).int().tolist()
        output[0, 0, y, x] = 9.0
        output[0, 1:3, y, x] = self.start - torch.tensor([x, y])
        output[0, 3:5, y, x] = self.end - torch.tensor([x, y])
        return output


@pytest.mark.parametrize(("distance", "drawn"), [(0.1, True), (20, True), (100, False)])
def test_a_straight_line_is_drawn_from_end_to_end(distance: float, drawn: bool) -> None:
    params = {"resolution": 0, "value_threshold": 0.1, "distance_threshold": distance}
    networks = {"mlsd": PlantedLine((20, 30), (100, 70))}
    made = lineart.mlsd(Source(np.zeros((96, 130, 3), np.uint8), None, 0, params, networks))
    assert made.any() == drawn
    if drawn:
        rows, columns = np.nonzero(made[:, :, 0])
        assert (columns.min(), columns.max(), rows.min(), rows.max()) == (20, 100, 30, 70)
