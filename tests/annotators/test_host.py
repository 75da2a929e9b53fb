"""The host of detector networks: loaded once, within its budget, failures told and forgotten."""

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from serve_app.annotators import networks
from serve_app.annotators.detectors import DetectorHost
from serve_app.errors import (
    AnnotatorUnavailable,
    ConfigError,
    ModelLoadFailed,
    OutOfMemory,
    RetryableError,
    UnsafeModel,
)
from support.detectors import fake_mediapipe, make_store

NAMES = ("pidinet", "mlsd", "lineart")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def filled(folder: Path) -> DetectorHost:
    return DetectorHost(make_store(folder, *NAMES), "cpu")


def host(filled: DetectorHost, budget_bytes: int = 1 << 30, device: str = "cpu") -> DetectorHost:
    return DetectorHost(filled.store, device, budget_bytes)


def test_those_who_ask_at_once_get_one_network(filled: DetectorHost) -> None:
    fresh = host(filled)
    together = threading.Barrier(8)

    def use(_: int) -> int:
        together.wait()
        with fresh.lease(("pidinet",)) as leased:
            assert torch.is_inference_mode_enabled()
            return id(leased["pidinet"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(8)))) == 1
    assert fresh.loads == 1
    assert fresh.loaded() == ("pidinet",)
    with fresh.lease(("pidinet",)) as leased:
        assert fresh.loaded_bytes == sum(
            tensor.nbytes for tensor in (*leased["pidinet"].parameters(), *leased["pidinet"].buffers())
        )


def test_the_least_recently_used_goes_first_and_none_in_use(filled: DetectorHost) -> None:
    sizes = {}
    for name in NAMES:
        alone = host(filled)
        with alone.lease((name,)):
            sizes[name] = alone.loaded_bytes
    slack = 1 << 17  # what a file has beside its tensors
    small = host(filled, sizes["pidinet"] + sizes["lineart"] + slack)
    for name in ("pidinet", "lineart", "pidinet"):
        with small.lease((name,)):
            pass
    assert small.loaded() == ("lineart", "pidinet")
    with small.lease(("mlsd",)):
        assert small.loaded() == ("pidinet", "mlsd")
    with small.lease(("pidinet",)), small.lease(("mlsd",)), small.lease(("lineart",)):
        assert set(small.loaded()) == set(NAMES)
    assert small.loaded_bytes <= sizes["pidinet"] + sizes["lineart"] + slack


def test_missing_weights_are_asked_for_again(folder: Path, filled: DetectorHost) -> None:
    fresh = host(filled)
    path = filled.store.served("mlsd")
    assert path is not None
    hidden = path.rename(folder / "hidden")
    for _ in range(2):
        with pytest.raises(AnnotatorUnavailable, match="weights fetch mlsd"), fresh.lease(("mlsd",)):
            pass
    hidden.rename(path)
    with fresh.lease(("mlsd",)):
        assert fresh.loaded() == ("mlsd",)


def test_a_file_of_another_hash_is_not_run(tmp_path: Path) -> None:
    store = make_store(tmp_path, "face_landmarker")
    path = store.served("face_landmarker")
    assert path is not None
    path.write_bytes(b"another")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mediapipe", fake_mediapipe())
        with (
            pytest.raises(UnsafeModel, match="not those that were published") as caught,
            DetectorHost(store).lease(("face_landmarker",)),
        ):
            pass
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("harm", ["another's", "cut"])
def test_where_weights_lie_is_for_the_log_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    store = make_store(tmp_path, "pidinet", "mlsd")
    path, other = store.require("pidinet"), store.require("mlsd")
    path.write_bytes(other.read_bytes() if harm == "another's" else path.read_bytes()[:-100])
    with (
        pytest.raises(ModelLoadFailed, match=r"table5_pidinet.*weights verify pidinet") as caught,
        DetectorHost(store, "cpu").lease(("pidinet",)),
    ):
        pass
    assert str(tmp_path) not in caught.value.message
    assert str(path) in caplog.text


def test_files_are_those_that_were_loaded(tmp_path: Path) -> None:
    store = make_store(tmp_path, "pidinet")
    path = store.require("pidinet")
    fresh = DetectorHost(store, "cpu")
    (lying,) = fresh.files(("pidinet",))
    with fresh.lease(("pidinet",)):
        assert fresh.files(("pidinet",)) == (lying,)
        data, stat = path.read_bytes(), path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as copies that keep times
        assert fresh.files(("pidinet",)) == (lying,)
        assert DetectorHost(store, "cpu").files(("pidinet",)) != (lying,)
        path.unlink()
        assert fresh.files(("pidinet",)) == (lying,)


def test_files_replaced_while_they_are_read_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, "pidinet")
    load = networks.pidinet

    def slow(path: Path) -> object:
        network = load(path)
        path.write_bytes(path.read_bytes())
        return network

    fresh = DetectorHost(store, "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(networks, "pidinet", slow)
        with pytest.raises(RetryableError, match="pidinet were replaced"), fresh.lease(("pidinet",)):
            pass
    with fresh.lease(("pidinet",)):
        assert fresh.loaded() == ("pidinet",)


@pytest.mark.parametrize(("reason", "kept"), [(OSError(errno.EIO, "I/O error"), False), (OSError("no header"), True)])
def test_what_the_system_did_to_a_load_is_no_damage(
    filled: DetectorHost, monkeypatch: pytest.MonkeyPatch, reason: OSError, kept: bool
) -> None:
    def broken(path: Path) -> object:
        raise ModelLoadFailed(f"{path}") from reason

    fresh = host(filled)
    with monkeypatch.context() as patch:
        patch.setattr(networks, "pidinet", broken)
        with pytest.raises(ModelLoadFailed, match="damaged"), fresh.lease(("pidinet",)):
            pass
    assert (fresh.problem("pidinet") is not None) == kept
    with fresh.lease(("pidinet",)):  # what is told does not keep anybody from trying
        assert fresh.problem("pidinet") is None


def test_a_full_device_is_told_in_our_words(filled: DetectorHost) -> None:
    with pytest.raises(OutOfMemory), host(filled).lease(("pidinet",)):
        raise torch.OutOfMemoryError
    with pytest.raises(ZeroDivisionError), host(filled).lease(("pidinet",)):
        raise ZeroDivisionError


@pytest.mark.parametrize("device", ["nonsense", "cuda"])
def test_a_device_that_is_not_there(filled: DetectorHost, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        return
    with pytest.raises(ConfigError, match=device), host(filled, device=device).lease(("pidinet",)):
        pass
