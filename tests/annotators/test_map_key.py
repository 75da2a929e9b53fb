"""The key of a control map: everything that changes the map, and nothing else."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.annotators import identity
from serve_app.annotators.cache import map_key
from serve_app.annotators.detectors import DetectorHost
from serve_app.annotators.identity import Identities
from serve_app.tasks import AnnotationTask
from support.detectors import make_store

SCALARS = st.integers(0, 99) | st.booleans() | st.text(max_size=3)


@settings(deadline=None)
@given(
    params=st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3),
    other=st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3),
    pixel=st.integers(0, 255),
)
def test_a_key_is_the_same_for_the_same_and_different_for_anything_else(
    params: dict[str, Any], other: dict[str, Any], pixel: int
) -> None:
    task = AnnotationTask(control_type="depth", width=64, height=72, seed=3)
    image = np.zeros((4, 6, 3), np.uint8)
    mask = np.zeros((4, 6), np.uint8)
    key = map_key(task, "zoe", params, "v1", image, mask)
    assert key == map_key(task, "zoe", dict(reversed(params.items())), "v1", np.asfortranarray(image), mask.copy())
    # HED is HED, whatever net its edges are for.
    assert key == map_key(task.model_copy(update={"control_type": "normal"}), "zoe", params, "v1", image, mask)
    touched = image.copy()
    touched[3, 5, 2] = pixel
    touched_mask = mask.copy()
    touched_mask[0, 0] = pixel
    different = [
        map_key(task.model_copy(update={"width": 72, "height": 64}), "zoe", params, "v1", image, mask),
        map_key(task.model_copy(update={"seed": 4}), "zoe", params, "v1", image, mask),
        map_key(task, "midas", params, "v1", image, mask),
        map_key(task, "zoe", params, "v2", image, mask),
        map_key(task, "zoe", params, "v1", image, None),
        map_key(task, "zoe", params, "v1", image.reshape(6, 4, 3), mask),
    ]
    if pixel:
        different += [
            map_key(task, "zoe", params, "v1", touched, mask),
            map_key(task, "zoe", params, "v1", image, touched_mask),
        ]
    if repr(sorted(params.items())) != repr(sorted(other.items())):
        different.append(map_key(task, "zoe", other, "v1", image, mask))
    assert len({key, *different}) == len(different) + 1


@pytest.fixture
def host(tmp_path: Path) -> Iterator[DetectorHost]:
    identity.code_digest.cache_clear()
    yield DetectorHost(make_store(tmp_path, "mlsd"), "auto")
    identity.code_digest.cache_clear()


def digest(host: DetectorHost, annotator: str) -> str:
    identity.code_digest.cache_clear()
    found = Identities(host).of(annotator)
    assert found is not None
    return found.digest


def test_the_device_is_part_of_networks_maps_alone(host: DetectorHost, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found.append((digest(host, "mlsd"), digest(host, "canny")))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]


def test_another_opencv_is_another_detector(host: DetectorHost, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(host, "canny")
    monkeypatch.setattr(cv2, "__version__", "0.0.1")  # whatever distribution it came from
    assert digest(host, "canny") != before


@pytest.mark.parametrize("package", ["scipy", "scikit-image", "torch", "torchvision", "timm", "mediapipe"])
def test_other_libraries_are_another_detector(
    host: DetectorHost, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    before = digest(host, "mlsd")
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name == package else installed(name))
    assert digest(host, "mlsd") != before


def test_files_that_are_gone_before_they_were_hashed_have_no_identity(host: DetectorHost) -> None:
    with host.lease(("mlsd",)):
        known = Identities(host)
        assert known.of("mlsd") is not None
        host.store.require("mlsd").unlink()
        assert known.of("mlsd") is not None
        assert Identities(host).of("mlsd") is None
