"""A mirror of the weights in S3, against a real S3 server."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.annotators.convert import convert, verify
from serve_app.annotators.mirror import Mirror
from serve_app.annotators.weights import WEIGHTS, WeightStore
from serve_app.cli import app
from serve_app.config import FetchConfig
from serve_app.errors import ConfigError, ModelLoadFailed, UnsafeModel
from support.detectors import make_store, write_pickle, write_transformer
from support.s3 import S3Server

CONFIG = FetchConfig(connect_timeout_s=60, total_timeout_s=60)

MakeMirror = Callable[[Path], Mirror]


@pytest.fixture(scope="module")
def opened(s3_server: S3Server) -> Mirror:
    """One client for all mirrors; what it was made from is the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        return Mirror.open("s3://some-bucket/weights/v1/", CONFIG)


@pytest.fixture
def make_mirror(s3_server: S3Server, opened: Mirror) -> MakeMirror:
    """A mirror of a folder, below a prefix in a bucket of its own."""

    def make(folder: Path) -> Mirror:
        mirror = replace(opened, bucket=s3_server.make_bucket())
        s3_server.put(folder, f"{mirror.bucket}/{mirror.prefix}")
        return mirror

    return make


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copy_of_a_weights_folder_is_a_mirror(s3_server: S3Server, opened: Mirror, tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", "pidinet", "face_landmarker")
    write_transformer(tmp_path / "hub", "upernet")
    (snapshot,) = (tmp_path / "hub").rglob("snapshots/*")
    shutil.copytree(snapshot, made.folder / WEIGHTS["upernet"].repo)
    mirror = replace(opened, bucket=s3_server.make_bucket())
    s3_server.copy(made.folder, f"{mirror.bucket}/weights/v1")
    here = WeightStore(tmp_path / "here", made.table)
    for name in ("pidinet", "face_landmarker", "upernet"):
        assert mirror.fetch(here, name) == here.served(name)
        assert here.state(name) == "ready"
    assert files(here.folder) == files(made.folder)
    assert verify(here, "pidinet").compared
    assert not verify(here, "upernet").compared


def test_what_is_published_and_there_is_not_asked_for_again(make_mirror: MakeMirror, tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", "pidinet")
    mirror = make_mirror(tmp_path / "empty")
    assert mirror.fetch(made, "pidinet") == made.served("pidinet")
    with pytest.raises(ModelLoadFailed, match="lacks"):  # not made of the published file: downloaded anew
        mirror.fetch(WeightStore(made.folder), "pidinet")


def test_a_converted_file_that_was_damaged_is_downloaded_anew(make_mirror: MakeMirror, tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", "pidinet")
    mirror = make_mirror(made.folder)
    path = made.require("pidinet")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[-1000] ^= 1
    path.write_bytes(bad)
    assert mirror.fetch(made, "pidinet").read_bytes() == good


def test_a_mirror_of_pickles_leaves_them_to_be_converted(make_mirror: MakeMirror, tmp_path: Path) -> None:
    row = write_pickle(tmp_path / "made", "mlsd")
    here = WeightStore(tmp_path / "here", {**WEIGHTS, "mlsd": row})
    path = make_mirror(tmp_path / "made").fetch(here, "mlsd")
    assert path == here.folder / row.repo / row.file
    assert here.state("mlsd") == "to convert"
    assert convert(here, "mlsd") == here.served("mlsd")


@pytest.mark.parametrize(
    ("name", "file", "refused"),
    [
        ("hed", "ControlNetHED.pth", UnsafeModel),
        ("hed", "ControlNetHED.safetensors", ModelLoadFailed),
        ("zoe", "model.safetensors", ModelLoadFailed),
        ("face_landmarker", "face_landmarker.task", UnsafeModel),
    ],
)
def test_what_is_damaged_or_another_is_refused_and_not_kept(
    make_mirror: MakeMirror, tmp_path: Path, name: str, file: str, refused: type[Exception]
) -> None:
    path = tmp_path / "made" / WEIGHTS[name].repo / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    for other in WEIGHTS[name].beside:
        (path.parent / other).write_text("{}")
    mirror = make_mirror(tmp_path / "made")
    here = WeightStore(tmp_path / "here")
    with pytest.raises(refused, match=rf"s3://{mirror.bucket}/weights/v1/{WEIGHTS[name].repo}/{file}: "):
        mirror.fetch(here, name)
    assert set(files(here.folder).values()) <= {b"{}"}
    assert here.state(name) == "missing"


def test_another_networks_safetensors_is_refused(make_mirror: MakeMirror, tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", "pidinet")
    with pytest.raises(UnsafeModel, match="as published"):
        make_mirror(made.folder).fetch(WeightStore(tmp_path / "here"), "pidinet")
    assert files(tmp_path / "here") == {}


def test_what_is_too_large_is_not_read(make_mirror: MakeMirror, tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", "face_landmarker")
    mirror = replace(make_mirror(made.folder), largest_bytes=10)
    with pytest.raises(UnsafeModel, match="allowed: 10"):
        mirror.fetch(WeightStore(tmp_path / "here", made.table), "face_landmarker")
    assert files(tmp_path / "here") == {}


@pytest.mark.parametrize("name", ["hed", "midas"])
def test_what_the_mirror_lacks_is_named(make_mirror: MakeMirror, tmp_path: Path, name: str) -> None:
    mirror = make_mirror(tmp_path / "made")
    with pytest.raises(ModelLoadFailed, match=rf"s3://{mirror.bucket}/weights/v1/{WEIGHTS[name].repo}/.*: NoSuchKey"):
        mirror.fetch(WeightStore(tmp_path / "here"), name)


def test_both_names_of_weights_are_named(make_mirror: MakeMirror, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"ControlNetHED\.safetensors.*ControlNetHED\.pth"):
        make_mirror(tmp_path / "made").fetch(WeightStore(tmp_path / "here"), "hed")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}, "EndpointConnectionError"),
        ({"AWS_ACCESS_KEY_ID": "another"}, "the store answers InvalidAccessKeyId"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "the store answers SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "NoCredentialsError"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_a_store_that_refuses_or_is_not_reached(
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str | None],
    said: str,
) -> None:
    environment = {**s3_server.environment, **changed}
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ModelLoadFailed, match=said) as caught:
        Mirror.open(f"s3://{s3_server.make_bucket()}", CONFIG).fetch(WeightStore(tmp_path / "here"), "hed")
    assert not any(value and value in caught.value.message for name, value in environment.items() if "KEY" in name)


@pytest.mark.parametrize(
    "url", ["bucket/prefix", "https://bucket", "s3://", "s3://B/x", "s3://buc ket", "s3://abc/x?y"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket"):
        Mirror.open(url, CONFIG)


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_command_tells_what_it_did_and_no_secret(s3_server: S3Server, tmp_path: Path, how: str) -> None:
    row = WEIGHTS["mlsd"]
    bucket = s3_server.make_bucket()
    write_pickle(tmp_path, "mlsd")
    s3_server.put(tmp_path, bucket)
    arguments = ["weights", "fetch", "hed", "mlsd", "--data", str(tmp_path / "data")]
    environment = dict(s3_server.environment)
    if how == "option":
        arguments += ["--mirror", f"s3://{bucket}"]
    else:
        environment["CONTROLNET_SERVE_WEIGHTS_MIRROR"] = f"s3://{bucket}"
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 1
    absent, other = done.stderr.splitlines()
    assert absent.startswith(f"error: hed: the mirror lacks the weights: s3://{bucket}/lllyasviel/Annotators/")
    assert other.startswith(f"error: mlsd: s3://{bucket}/{row.repo}/{row.file}: its SHA-256 is ")  # random numbers
    assert s3_server.secret_key not in done.output
