"""What ``make serve`` runs, as a process: it prints an address, a key and a curl that works, and ends clean."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

pytestmark = pytest.mark.cluster

KEY = "a key with spaces, 0123456789"
API = "/api/v1/enterprise"
STOP_S = 15
"""What a user who pressed Ctrl-C will wait."""


@dataclass(frozen=True)
class Started:
    process: "subprocess.Popen[str]"
    banner: str
    http: httpx2.Client

    def post(self, path: str, **fields: object) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.post(f"{API}/{path}", json={"key": KEY, **fields}).json()
        return answer

    def ends_clean(self) -> bool:
        """Press Ctrl-C; whether everything it started is gone in time."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_S) == 0 and not still_running(family)


def launch(data: Path, port: int, **more: str) -> "subprocess.Popen[str]":
    """``more``: variables of its environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"PORT": str(port), "DATA": str(data), "KEY": KEY, **more}
    return subprocess.Popen(
        [sys.executable, "-m", "deployments.serve"],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; a zombie has, its new parent only has not collected it yet."""
    _, left = psutil.wait_procs(processes, timeout=2)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started(data: Path, **more: str) -> Iterator[Started]:
    port = free_port()
    with launch(data, port, **more) as process:
        assert process.stdout is not None
        banner = ""
        while "Ctrl-C" not in banner:
            line = process.stdout.readline()
            assert line, f"the server ended: {banner}"
            banner += line
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                yield Started(process, banner, http)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def test_the_printed_curl_works_and_ctrl_c_ends_everything(tmp_path: Path) -> None:
    """Without weights, beside a mediapipe with which ``import controlnet_aux`` fails: what can be served is."""
    package = tmp_path / "packages" / "mediapipe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '1.2.2'\n")
    with started(tmp_path, PYTHONPATH=str(package.parent)) as server:
        command = re.search(r"^ *(curl .*)$", server.banner, re.MULTILINE)
        assert command is not None
        answer = subprocess.run(["bash", "-c", command[1]], check=True, capture_output=True, text=True).stdout
        assert '"status":"success"' in answer
        assert server.http.get("/readyz").status_code == 200
        assert (tmp_path / "jobs.sqlite3").exists()
        for kind, said in (("depth", "fetch depth_anything_v2"), ("face_detector", "fetch face_landmarker")):
            refused = server.post("annotate", controlnet_type=kind, init_image=sample())
            assert f"run: controlnet-serve weights {said}" in refused["message"]["annotator"][0]
        assert server.post("annotate", controlnet_type="canny", init_image=sample())["status"] == "success"
        ready = server.post("system_details")["control_types_ready"]
        assert {"canny", "tile"} <= set(ready)
        assert not {"depth", "face_detector"} & set(ready)
        assert server.ends_clean()


def test_ctrl_c_while_it_starts_ends_everything(tmp_path: Path) -> None:
    with launch(tmp_path, free_port()) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("jobs.sqlite3")):  # made just before Ray is started
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1.5)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(STOP_S) == 0
        assert not still_running(family)
        output = process.stdout.read() if process.stdout else ""
        assert "API key" not in output


def test_a_port_in_use_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with launch(tmp_path, taken.getsockname()[1]) as process:
            assert process.wait(60) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_a_second_start_continues_with_the_jobs_of_the_first(tmp_path: Path) -> None:
    wish = {"model_id": "demo", "controlnet_model": "tile", "prompt": "x", "instant_response": "yes", "samples": 2}
    wish |= {"num_inference_steps": 40, "init_image": sample()}
    with started(tmp_path) as server:
        ids = [server.post("controlnet", **wish)["id"] for _ in range(4)]
        assert server.post("fetch", request_id=ids[0])["status"] == "processing"
        assert server.ends_clean()
    with started(tmp_path) as server:
        deadline = time.monotonic() + 240
        for job_id in ids:
            while (answer := server.post("fetch", request_id=job_id))["status"] == "processing":
                assert time.monotonic() < deadline
                time.sleep(0.5)
            assert answer["status"] == "success"
        assert server.ends_clean()


def sample() -> str:
    from deployments.serve import sample_image

    return sample_image()
