"""The whole server as a benchmark's other end: started from this checkout, or running somewhere."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2

API = "/api/v1/enterprise"


class Server:
    """A running server as its client sees it."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx2.Client(base_url=url, timeout=600)
        self._key = key

    def draw(self, body: Mapping[str, object]) -> dict[str, Any]:
        """Send one request, wait for its picture, and return the answer that has it.

        Raises:
            RuntimeError: the request failed.
        """
        answer = self.post("controlnet", body)
        while answer["status"] == "processing":
            time.sleep(0.1)
            answer = self.post("fetch", {"request_id": answer["id"]})
        if answer["status"] != "success":
            raise RuntimeError(f"the request failed: {answer}")
        return answer

    def picture(self, url: str) -> bytes:
        return self._http.get(url).raise_for_status().content

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        answer: dict[str, Any] = self._http.post(f"{API}/{path}", json={**body, "key": self._key}).json()
        return answer


@contextmanager
def own_server() -> Iterator[tuple[str, str]]:
    """A server of this checkout; ended by SIGINT, as Ctrl-C would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = "benchmark-key-0123456789"
    with tempfile.TemporaryDirectory() as data:
        environ = os.environ | {"PORT": str(port), "DATA": data, "KEY": key}
        process = subprocess.Popen(
            [sys.executable, "-m", "deployments.serve"], env=environ, stdout=subprocess.PIPE, text=True
        )
        try:
            for line in process.stdout or ():
                if "Ctrl-C" in line:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            yield f"http://127.0.0.1:{port}", key
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
