"""The service as a process, without weights and with every kind of mediapipe: it starts, says what is missing, serves
the rest."""

import base64
import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from serve_app.annotators import ANNOTATORS
from serve_app.controls import CONTROL_TYPES
from serve_app.images import encode_png, resize_image
from support.detectors import make_store

KEY = "optional-packages-0123456789"
API = "/api/v1/enterprise"
PHOTO = resize_image(skimage.data.astronaut(), 96, 64)
SENT = {"init_image": base64.b64encode(encode_png(PHOTO)).decode(), "width": 96, "height": 64}
TESTS = Path(__file__).parents[1]


@dataclass
class Service:
    http: httpx2.Client
    process: "subprocess.Popen[str]"

    def types(self) -> dict[str, dict[str, Any]]:
        answer = self.http.get(f"{API}/annotators", headers={"Authorization": f"Bearer {KEY}"}).json()
        return {row["control_type"]: row for row in answer["control_types"]}

    def post(self, path: str, **fields: object) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.post(f"{API}/{path}", json={"key": KEY, **SENT, **fields}).json()
        return answer

    def picture(self, answer: dict[str, Any]) -> np.ndarray[Any, Any]:
        assert answer["status"] == "success", answer
        return np.asarray(Image.open(io.BytesIO(self.http.get(answer["output"][0]).content)))

    def stop(self, last: str = "") -> str:
        """End it; what it says at last."""
        output, _ = self.process.communicate(last, timeout=60)
        assert self.process.returncode == 0
        return output.strip()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@contextmanager
def service(data: Path, models: Path, packages: Path) -> Iterator[Service]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (packages, TESTS, TESTS.parent)))}
    with subprocess.Popen(
        [sys.executable, "-m", "support.local_service", str(data), str(models), str(port), KEY],
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                yield Service(http, process)
        finally:
            process.kill()


def check_lists_what_is_missing(running: Service, ready: set[str]) -> None:
    """Every annotator with weights lacks them, save those in ``ready``, and says which command brings them."""
    found = {one["name"]: one for row in running.types().values() for one in row["annotators"]}
    assert set(found) == {*ANNOTATORS, "none"}
    for name, one in found.items():
        if name == "none" or not ANNOTATORS[name].networks or name in ready:
            assert (one["ready"], one["missing"]) == (True, None), name
        else:
            assert one["ready"] is False, name
            assert "controlnet-serve weights fetch" in one["missing"], name
    assert set(running.post("system_details")["control_types_ready"]) == {
        kind for kind, row in CONTROL_TYPES.items() if found[row.annotator]["ready"]
    }


def check_serves_the_rest(running: Service) -> None:
    edges = running.picture(running.post("annotate", controlnet_type="canny"))
    assert np.array_equal(edges[:, :, 0], cv2.Canny(PHOTO, 100, 200))
    wish = {"model_id": "demo", "prompt": "a house", "num_inference_steps": 2, "seed": 1}
    assert running.picture(running.post("controlnet", controlnet_model="canny", **wish)).shape == (64, 96, 3)
    refused = running.post("annotate", controlnet_type="depth")
    assert "run: controlnet-serve weights fetch depth_anything_v2" in refused["message"]["annotator"][0]


def test_without_mediapipe_and_without_weights(tmp_path: Path, models: Path) -> None:
    with service(tmp_path / "data", models, tmp_path) as running:
        check_lists_what_is_missing(running, set())
        assert "the package mediapipe is not installed" in running.types()["face_detector"]["annotators"][0]["missing"]
        check_serves_the_rest(running)
        assert running.stop() == ""


def test_with_a_mediapipe_that_breaks_controlnet_aux(tmp_path: Path, models: Path) -> None:
    """A stand-in for 1.2.2, with which ``import controlnet_aux`` fails in the same way."""
    package = tmp_path / "packages" / "mediapipe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1.2.2'\n")
    make_store(tmp_path / "data" / "annotators", "mlsd")
    with service(tmp_path / "data", models, package.parent) as running:
        check_lists_what_is_missing(running, {"mlsd"})
        missing = running.types()["face_detector"]["annotators"][0]["missing"]
        assert "face_landmarker.task" in missing
        assert "is not installed" not in missing
        check_serves_the_rest(running)
        lines = running.picture(running.post("annotate", controlnet_type="mlsd"))  # a network of controlnet_aux
        assert lines.shape == (64, 96, 3)
        assert running.stop("import") == "AttributeError: module 'mediapipe' has no attribute 'solutions'"
