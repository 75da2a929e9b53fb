"""Detectors with random weights, made once for the folder, and where the cache of maps keeps its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.storage.local import LocalStore
from support.detectors import Detectors, fake_mediapipe
from support.s3 import s3_server

__all__ = ["s3_server"]


@pytest.fixture(scope="session")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detectors]:
    """Every annotator with weights, in the real formats; mediapipe is a stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mediapipe", fake_mediapipe())
        yield Detectors(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects")
