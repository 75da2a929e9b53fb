"""Damaged and hostile files of weights: one error that says which file, whatever is in it, and nothing left behind."""

import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from serve_app.annotators import Missing, readiness
from serve_app.annotators.convert import NO_DIGEST, convert, verify
from serve_app.annotators.detectors import DetectorHost
from serve_app.annotators.weights import NETWORKS, WEIGHTS, WeightStore
from serve_app.cli import app
from serve_app.errors import AnnotatorUnavailable, ModelLoadFailed, UnsafeModel
from support.detectors import make_store, sha256

Damage = Callable[[bytes], bytes]
_LENGTH = 8
"""Bytes of a safetensors file that say how long its header is."""


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(**facts: object) -> Damage:
    """Other facts in the header's first tensor."""

    def damage(good: bytes) -> bytes:
        end = _LENGTH + struct.unpack("<Q", good[:_LENGTH])[0]
        header = json.loads(good[_LENGTH:end])
        next(value for name, value in header.items() if name != "__metadata__").update(facts)
        return packed(header, good[end:])

    return damage


DAMAGES: dict[str, Damage] = {
    "empty": lambda _: b"",
    "random": lambda _: random.Random(1).randbytes(5000),
    "no length": lambda good: good[:5],
    "half a header": lambda good: good[:200],
    "cut short": lambda good: good[:-100],
    "longer": lambda good: good + b"more",
    "a huge header": lambda good: struct.pack("<Q", 2**63) + good[_LENGTH:],
    "a header larger than the file": lambda good: struct.pack("<Q", 90_000_000) + good[_LENGTH:],
    "no JSON": lambda _: packed(b"[1, 2"),
    "deep JSON": lambda _: packed(b"[" * 100_000),
    "no UTF-8": lambda _: packed(b"\xff\xfe{}"),
    "numbers as metadata": lambda _: packed({"__metadata__": {"source_sha256": 1}}),
    "an unknown type": changed(dtype="F99"),
    "a huge shape": changed(shape=[2**62, 2**62]),
    "a negative shape": changed(shape=[-1]),
    "offsets out of the file": changed(data_offsets=[0, 10**15]),
    "offsets turned round": changed(data_offsets=[10, 5]),
    "a pickle": lambda _: pickle.dumps({"weight": 1}),
}


@pytest.fixture(scope="module", params=["pidinet", "upernet"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[WeightStore, str]:
    """Of a pickle, and of a model that transformers loads."""
    return make_store(tmp_path_factory.mktemp("intact"), request.param), request.param


@contextmanager
def holding(intact: tuple[WeightStore, str], data: bytes) -> Iterator[WeightStore]:
    """The store with ``data`` in place of the weights."""
    store, name = intact
    path = store.served(name)
    assert path is not None
    good = path.read_bytes()
    path.write_bytes(data)
    try:
        yield store
    finally:
        path.write_bytes(good)


def good_bytes(intact: tuple[WeightStore, str]) -> bytes:
    path = intact[0].served(intact[1])
    assert path is not None
    return path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_safetensors_is_told(intact: tuple[WeightStore, str], damage: str) -> None:
    with (
        holding(intact, DAMAGES[damage](good_bytes(intact))) as store,
        pytest.raises(ModelLoadFailed, match=r"safetensors: not a whole safetensors file: \S"),
    ):
        verify(store, intact[1])


@pytest.mark.parametrize("fault", ["names", "shapes"])
def test_a_whole_safetensors_of_something_else_is_told(intact: tuple[WeightStore, str], fault: str) -> None:
    store, name = intact
    path = store.served(name)
    assert path is not None
    state = load_file(path)
    other = {f"{key}x": value for key, value in state.items()} if fault == "names" else dict.fromkeys(state)
    tensors = {key: value if value is not None else torch.zeros(1) for key, value in other.items()}
    data = save({key: value.clone() for key, value in tensors.items()}, {"source_sha256": str(store.row(name).sha256)})
    with holding(intact, data), pytest.raises(ModelLoadFailed, match=rf"(?s){path.parent}.*(missing|mismatch)"):
        verify(store, name)


def test_random_damage_ends_in_our_errors_alone(intact: tuple[WeightStore, str]) -> None:
    """Also where services load it. Bytes of the header are overwritten; some of them matter to nobody."""
    good = good_bytes(intact)
    load = resolve_name(NETWORKS[intact[1]].loader)
    chance = random.Random(2)
    end = _LENGTH + struct.unpack("<Q", good[:_LENGTH])[0]
    for _ in range(20):
        data = bytearray(good)
        for _ in range(3):
            data[chance.randrange(end)] = chance.randrange(256)
        with holding(intact, bytes(data)) as store, suppress(ModelLoadFailed):
            load(store.require(intact[1]))


def test_another_safetensors_than_the_published_one(tmp_path: Path) -> None:
    """The plain folder is read first, whatever lies there; only ``verify`` compares it."""
    store = make_store(tmp_path, "depth_anything_v2")
    (snapshot,) = tmp_path.rglob("snapshots/*")
    plain = tmp_path / WEIGHTS["depth_anything_v2"].repo
    shutil.copytree(snapshot, plain)
    path = store.require("depth_anything_v2")
    assert path == plain / "model.safetensors"
    row = replace(WEIGHTS["depth_anything_v2"], sha256=sha256(path))
    assert verify(WeightStore(tmp_path, {"depth_anything_v2": row}), "depth_anything_v2").compared
    with pytest.raises(UnsafeModel, match="as published"):
        verify(WeightStore(tmp_path, WEIGHTS), "depth_anything_v2")


def test_what_a_pickle_of_a_known_hash_was_converted_to(tmp_path: Path) -> None:
    store = make_store(tmp_path, "midas")
    (weights,) = tmp_path.rglob("model.safetensors")
    published = weights.with_name("pytorch_model.bin")
    torch.save(load_file(weights), published)
    weights.unlink()
    row = replace(WEIGHTS["midas"], pickle_sha256=sha256(published))
    known = WeightStore(tmp_path, {"midas": row})
    assert known.state("midas") == "to convert"
    with pytest.raises(UnsafeModel, match="as published"):
        convert(store, "midas")
    assert convert(known, "midas") == known.served("midas")
    assert verify(known, "midas").compared
    with pytest.raises(UnsafeModel, match=rf"made of a file with the SHA-256 {row.pickle_sha256}"):
        verify(WeightStore(tmp_path, WEIGHTS), "midas")


@pytest.mark.parametrize("damage", ["bytes", "types"])
def test_what_was_damaged_after_it_was_converted_is_told(tmp_path: Path, damage: str) -> None:
    store = make_store(tmp_path, "pidinet")
    path = store.require("pidinet")
    good = path.read_bytes()
    assert verify(store, "pidinet").compared
    bad = bytearray(good)
    bad[-1000] ^= 1
    path.write_bytes(bad if damage == "bytes" else good.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ModelLoadFailed, match=rf"{path}: damaged: its tensors have the SHA-256 \w+"):
        verify(store, "pidinet")


def test_what_an_older_version_converted_is_not_called_the_same(tmp_path: Path) -> None:
    store = make_store(tmp_path, "pidinet")
    path = store.require("pidinet")
    path.write_bytes(save(load_file(path), {"source_sha256": str(store.row("pidinet").sha256)}))
    found = verify(store, "pidinet")
    assert not found.compared
    assert "converted by an older version: no digest to compare" in found.uncompared == NO_DIGEST


def test_files_in_the_way_are_one_line_each(tmp_path: Path) -> None:
    """In the command: the names after a bad one have their turn."""
    folder = make_store(tmp_path / "annotators", "pidinet", "upernet").folder
    (plain,) = folder.rglob("table5_pidinet.safetensors")
    plain.unlink()
    plain.mkdir()
    (weights,) = folder.rglob("model.safetensors")
    weights.write_bytes(b"")
    done = CliRunner().invoke(app, ["weights", "verify", "pidinet", "hed", "upernet", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    lines = done.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["error", name] for name in ("pidinet", "hed", "upernet")]


@contextmanager
def nobody() -> Iterator[None]:
    """Give up root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_told() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), "pidinet")
        path = store.served("pidinet")
        assert path is not None
        assert verify(store, "pidinet").compared  # and what it imports is imported
        Path(folder).chmod(0o755)
        path.chmod(0)
        with nobody():
            assert store.state("pidinet") == "unreadable"
            assert isinstance(readiness(store)["pidinet"], Missing)
            with pytest.raises(AnnotatorUnavailable, match=r"table5_pidinet.safetensors .*cannot be read by this user"):
                verify(store, "pidinet")
        path.parent.chmod(0)
        with nobody(), pytest.raises(AnnotatorUnavailable, match="not in the weights folder"):
            verify(store, "pidinet")
        path.parent.chmod(0o700)


def test_a_file_taken_away_from_this_user_at_the_last_moment_is_not_called_damaged() -> None:
    """``require`` looks first; what it saw may have changed when the file is opened."""

    class Late(WeightStore):
        def problem(self, network: str) -> None: ...

    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), "pidinet")
        Path(folder).chmod(0o755)
        host = DetectorHost(Late(store.folder, store.table), "cpu")
        with host.lease(("pidinet",)):
            pass
        store.require("pidinet").chmod(0)
        other = DetectorHost(Late(store.folder, store.table), "cpu")
        with nobody():
            with pytest.raises(ModelLoadFailed, match="cannot be read by this user"), other.lease(("pidinet",)):
                pass
            assert other.problem("pidinet") is None  # it may pass


class _Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return (os._exit, (3,))


def _saved(value: object, folder: Path) -> bytes:
    path = folder / "saved"
    torch.save(value, path)
    return path.read_bytes()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "empty": lambda _: b"",
    "random": lambda _: random.Random(3).randbytes(5000),
    "text": lambda _: b"version https://git-lfs.github.com/spec/v1\n",
    "a zip of nothing": lambda _: b"PK\x05\x06" + bytes(18),
    "code": lambda _: pickle.dumps(_Bomb()),
    "code among tensors": lambda folder: _saved({"a": torch.zeros(1), "b": _Bomb()}, folder),
    "code in a zip": lambda folder: _saved(_Bomb(), folder),
    "cut short": lambda folder: _saved({"a": torch.zeros(1000)}, folder)[:-900],
    "a number": lambda folder: _saved(3, folder),
    "a tensor": lambda folder: _saved(torch.zeros(3), folder),
    "nothing": lambda folder: _saved({}, folder),
    "numbers by name": lambda folder: _saved({"a": 1.0}, folder),
    "a view of 16 TB": lambda folder: _saved({"a": torch.zeros(1).expand(2**42)}, folder),
    "a sparse tensor": lambda folder: _saved({"a": torch.eye(3).to_sparse()}, folder),
    "a tensor without numbers": lambda folder: _saved({"a": torch.zeros(3, device="meta")}, folder),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_damaged_or_hostile_pickle_is_refused(tmp_path: Path, kind: str) -> None:
    row = WEIGHTS["mlsd"]
    path = tmp_path / row.repo / row.file
    path.parent.mkdir(parents=True)
    path.write_bytes(PICKLES[kind](tmp_path))
    with pytest.raises((ModelLoadFailed, UnsafeModel), match=rf"^{path}: \S") as caught:
        convert(WeightStore(tmp_path, {"mlsd": replace(row, sha256=sha256(path))}), "mlsd")
    assert "\n" not in caught.value.message
    assert [each.name for each in path.parent.iterdir()] == [path.name]
