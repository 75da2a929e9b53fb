"""mediapipe that does not work: whoever asks is told what helps, and where files lie is for the log."""

import sys
from typing import Any

import numpy as np
import pytest

from serve_app.annotators.face import mediapipe_face
from serve_app.annotators.source import Source
from serve_app.errors import AnnotatorUnavailable
from support.detectors import TASK, fake_mediapipe

SOURCE = Source(
    np.zeros((96, 96, 3), np.uint8),
    None,
    0,
    {"resolution": 0, "max_faces": 1, "min_confidence": 0.5},
    {"face_landmarker": TASK},
)


@pytest.mark.parametrize("moment", ["create", "detect"])
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError])
def test_its_errors_become_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, moment: str, kind: type[Exception]
) -> None:
    def fail(*_: Any) -> Any:
        raise kind("Unable to open /srv/secret/libmediapipe.so")

    module: Any = fake_mediapipe(*[fail] if moment == "detect" else [])
    if moment == "create":
        monkeypatch.setattr(module.tasks.vision.FaceLandmarker, "create_from_options", fail)
    monkeypatch.setitem(sys.modules, "mediapipe", module)
    with pytest.raises(AnnotatorUnavailable, match="pip install --no-deps mediapipe") as caught:
        mediapipe_face(SOURCE)
    assert "flatbuffers" in caught.value.message
    assert "/srv" not in caught.value.message
    assert "/srv/secret" in caplog.text


def test_one_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(AnnotatorUnavailable, match=r"cannot be imported.*--no-deps mediapipe"):
        mediapipe_face(SOURCE)
