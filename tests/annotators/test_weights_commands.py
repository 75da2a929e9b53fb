"""The commands that bring weights: fetched from a hub and from an address of their own, listed, converted."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.annotators import Ready, readiness
from serve_app.annotators.convert import verify
from serve_app.annotators.fetch import fetch
from serve_app.annotators.weights import WEIGHTS, WeightStore
from serve_app.cli import app
from serve_app.config import FetchConfig
from serve_app.errors import UnsafeModel
from support.detectors import TASK, write_pickle, write_transformer


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that downloading a file needs: names and hashes in the headers, then bytes."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        data = self.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.end_headers()
        if body and data is not None:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and the files it has by path; an empty dict at first."""
    files: dict[str, bytes] = {}
    handler = type("FilledHub", (Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", files
        finally:
            server.shutdown()
            thread.join()


def weights_command(
    hub: str, data: Path, *arguments: str, stdout: int = subprocess.PIPE, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """``variables``: of the process's environment; the switch of the tests' own process is not handed on."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", "from serve_app.cli import main; main()", "weights", *arguments, "--data", str(data)],
        env=environment | {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


class TestCommands:
    def test_a_transformer_is_fetched_and_verified(self, hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
        address, files = hub
        write_transformer(tmp_path / "made", "upernet")
        for name in ("config.json", "model.safetensors"):
            (path,) = (tmp_path / "made").rglob(name)
            files[f"/openmmlab/upernet-convnext-small/resolve/main/{name}"] = path.read_bytes()
        data = tmp_path / "data"
        done = weights_command(address, data, "fetch", "upernet")
        assert done.returncode == 0, done.stderr
        assert f"models--openmmlab--upernet-convnext-small/snapshots/{Hub.commit}/model.safetensors" in done.stdout
        assert readiness(WeightStore(data / "annotators"))["upernet"] == Ready()
        assert not verify(WeightStore(data / "annotators"), "upernet").compared

    def test_a_file_that_is_not_the_published_one_and_one_that_is_not_there(
        self, hub: tuple[str, dict[str, bytes]], tmp_path: Path
    ) -> None:
        address, files = hub
        row = WEIGHTS["hed"]
        files[f"/{row.repo}/resolve/{row.revision}/{row.file}"] = b"something else"
        done = weights_command(address, tmp_path, "fetch", "hed", "mlsd")
        assert done.returncode == 1
        assert "error: hed: " in done.stderr
        assert "as published" in done.stderr
        assert "error: mlsd: lllyasviel/Annotators: mlsd_large_512_fp32.pth" in done.stderr

    def test_what_came_damaged_is_told_and_deleted(self, hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
        address, files = hub
        row = WEIGHTS["depth_anything_v2"]
        files[f"/{row.repo}/resolve/{row.revision}/config.json"] = b"{}"
        files[f"/{row.repo}/resolve/{row.revision}/model.safetensors"] = b"half of it"
        done = weights_command(address, tmp_path, "fetch", "depth_anything_v2")
        assert "not a whole safetensors file" in done.stderr
        assert WeightStore(tmp_path / "annotators").state("depth_anything_v2") == "missing"
        assert [path.name for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size == 10] == []

    def test_a_hub_that_is_not_reached_is_one_line_at_once(self, tmp_path: Path) -> None:
        """The library would ask six times, with pauses of half a minute, and say so each time."""
        done = weights_command("http://127.0.0.1:9", tmp_path, "fetch", "hed", "upernet")
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert [line.split(": ")[1] for line in lines] == ["hed", "upernet"]
        assert all("the hub (127.0.0.1) is not reached" in line for line in lines)

    def test_offline_says_so_and_where_the_file_is_expected(self, tmp_path: Path) -> None:
        done = weights_command("http://127.0.0.1:9", tmp_path, "fetch", "midas", HF_HUB_OFFLINE="1")
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "HF_HUB_OFFLINE" in line
        assert "put model.safetensors or pytorch_model.bin and config.json" in line
        assert str(tmp_path / "annotators" / "Intel" / "dpt-hybrid-midas") in line

    def test_list_is_a_table_with_what_to_run(self, tmp_path: Path) -> None:
        write_pickle(tmp_path / "annotators", "mlsd")
        done = CliRunner().invoke(app, ["weights", "list", "--data", str(tmp_path)])
        assert done.exit_code == 0, done.stderr
        heading, *rows = done.stdout.splitlines()[: 1 + len(WEIGHTS)]
        for title in ("STATE", "ANNOTATORS", "LICENCE", "SHA-256", "PUBLISHED AS"):
            column = heading.index(title)
            assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows), title
        cells = [re.split("  +", row) for row in rows]
        assert cells[0][:4] == ["hed", "missing", "hed, scribble_hed", "Apache-2.0"]
        assert {row[0]: row[1] for row in cells}["mlsd"] == "to convert"
        assert re.search("^run: controlnet-serve weights fetch hed .*face_landmarker$", done.stdout, re.MULTILINE)
        assert "run: controlnet-serve weights convert mlsd\n" in done.stdout
        assert "canny" not in done.stdout

    def test_a_terminal_that_is_gone_is_no_fault_of_the_weights(self, tmp_path: Path) -> None:
        """As in ``weights convert --all | head``."""
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = weights_command("http://127.0.0.1:9", tmp_path, "convert", "face_landmarker", stdout=writing)
        finally:
            os.close(writing)
        assert done.returncode == 1
        assert done.stderr == ""

    def test_nothing_named_is_a_mistake(self, tmp_path: Path) -> None:
        done = CliRunner().invoke(app, ["weights", "convert", "--data", str(tmp_path)])
        assert done.exit_code == 1
        assert "--all" in done.stderr


def test_the_face_model_is_fetched_from_its_own_address(hub: tuple[str, dict[str, bytes]], tmp_path: Path) -> None:
    address, files = hub
    files["/face_landmarker.task"] = TASK
    row = replace(
        WEIGHTS["face_landmarker"], url=f"{address}/face_landmarker.task", sha256=hashlib.sha256(TASK).hexdigest()
    )
    config = FetchConfig(allow_hosts=("127.0.0.1",))
    store = WeightStore(tmp_path, {**WEIGHTS, "face_landmarker": row})
    assert fetch(store, "face_landmarker", config).read_bytes() == TASK
    assert store.served("face_landmarker") is not None
    files["/face_landmarker.task"] = b"another"
    with pytest.raises(UnsafeModel, match="as published"):
        fetch(WeightStore(tmp_path / "other", store.table), "face_landmarker", config)
