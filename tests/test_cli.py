"""The command line, as processes: what it prints, and that a user's mistake is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.built import build_base


def cli(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from serve_app.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_keys_from_making_to_revoking(tmp_path: Path) -> None:
    made = cli("keys", "create", "laptop", "--scope", "generate", "--data", tmp_path)
    assert made.stdout.startswith("cns_")
    listed = cli("keys", "list", "--data", tmp_path).stdout
    assert "laptop" in listed
    assert made.stdout.strip() not in listed
    assert cli("keys", "revoke", listed.split()[0], "--data", tmp_path).returncode == 0
    assert "revoked" in cli("keys", "list", "--data", tmp_path).stdout


def test_a_model_is_published_and_removed(tmp_path: Path) -> None:
    folder = build_base(tmp_path / "tiny")
    added = cli("models", "add", "tiny", folder, "--family", "tests", "--data", tmp_path)
    assert added.stdout.startswith("tiny  base  tests"), added.stderr
    assert "tiny" in cli("models", "list", "--data", tmp_path).stdout
    assert cli("models", "remove", "tiny", "--data", tmp_path).returncode == 0
    assert "tiny" not in cli("models", "list", "--data", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("models", "add", "../x", "/nowhere"), "id: "),
        (("models", "add", "x", "/nowhere"), "/nowhere"),
        (("models", "remove", "absent"), "absent"),
        (("keys", "create", "--scope", "root"), "root"),
        (("keys", "revoke", "absent"), "absent"),
        (("jobs", "show", "1"), "no job 1"),
        (("config", "check", "--config", "/nowhere.yaml"), "/nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = cli(*arguments, "--data", tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
