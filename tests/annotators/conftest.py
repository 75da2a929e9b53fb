"""Detectors with random weights, made once for the folder."""

import sys
from collections.abc import Iterator

import pytest

from support.detectors import Detectors, fake_mediapipe


@pytest.fixture(scope="session")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Detectors]:
    """Every annotator with weights, in the real formats; mediapipe is a stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mediapipe", fake_mediapipe())
        yield Detectors(tmp_path_factory.mktemp("weights"))
