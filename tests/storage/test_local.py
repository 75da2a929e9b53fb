"""The local object store: atomic, durable, and closed to everything outside its folder."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ConfigError
from serve_app.storage import open_store
from serve_app.storage.local import LocalStore

KEY = "attempts/1/2/picture-0.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


def test_what_is_put_is_got(store: LocalStore) -> None:
    for data, content_type in ((b"", "text/plain"), (b"\x00" * 70_000, "image/png"), (b"abc", "text/plain; a=b")):
        store.put(KEY, data, content_type)
        assert store.get(KEY) == data
        info = store.info(KEY)
        assert info is not None
        assert (info.size_bytes, info.content_type) == (len(data), content_type)
        assert info.modified_at > 1_700_000_000


def test_a_stored_picture_begins_with_its_own_bytes(store: LocalStore, root: Path) -> None:
    store.put(KEY, b"\x89PNG...", "image/png")
    assert (root / KEY).read_bytes().startswith(b"\x89PNG...")


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 0, b"0"), (2, 5, b"2345"), (8, 100, b"89"), (0, 9, b"0123456789"), (10, 20, b""), (50, 60, b"")],
)
def test_ranges_hold_both_ends_and_never_more_than_the_object(
    store: LocalStore, start: int, end: int, expected: bytes
) -> None:
    store.put(KEY, b"0123456789", "text/plain")
    assert store.get_range(KEY, start, end) == expected


def test_what_is_not_there(store: LocalStore) -> None:
    store.put(KEY, b"x", "text/plain")
    for absent in ("other", "attempts/1", f"{KEY}/below"):
        assert store.info(absent) is None
        with pytest.raises(KeyError):
            store.get(absent)
        with pytest.raises(KeyError):
            store.get_range(absent, 0, 1)
        store.delete(absent)
    assert store.get(KEY) == b"x"


@pytest.mark.parametrize(
    "key",
    ["", "/", "/etc/passwd", "..", "../x", "a/../b", "a/./b", "a//b", "a/", ".tmp/x", "a b", "a\\b", "a\x00b", "ü",
     "a\n", "a%2e", "x" * 201, "~", "a:b"],
)  # fmt: skip
def test_a_key_cannot_leave_the_folder(store: LocalStore, root: Path, key: str) -> None:
    (root.parent / "x").write_text("secret")
    for use in (
        lambda: store.put(key, b"", "text/plain"),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.info(key),
        lambda: store.delete(key),
        lambda: store.delete_prefix(key),
    ):
        with pytest.raises(ValueError, match="not an object key"):
            use()
    assert (root.parent / "x").read_text() == "secret"


def test_deleting_leaves_no_empty_folders(store: LocalStore, root: Path) -> None:
    for name in ("attempts/1/1/a", "attempts/1/1/b/c", "attempts/1/10/a", "attempts/2"):
        store.put(name, b"x", "text/plain")
    store.delete_prefix("attempts/1/1")
    assert store.info("attempts/1/1/a") is None
    assert store.get("attempts/1/10/a") == b"x"
    store.delete_prefix("attempts/1/10")
    store.delete_prefix("attempts/1/10")
    assert not (root / "attempts/1").exists()
    store.delete("attempts/2")
    assert [path.name for path in root.iterdir()] == [".tmp"]


def test_readers_see_all_of_an_object_or_nothing(store: LocalStore) -> None:
    wrong: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            data = store.get(KEY)
            if len(set(data)) != 1 or len(data) != 50_000 * (1 + data[0]):
                wrong.append(data)

    store.put(KEY, b"\x00" * 50_000, "image/png")
    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        store.put(KEY, bytes([number % 3]) * 50_000 * (1 + number % 3), "image/png")
    done.set()
    reader.join()
    assert wrong == []


def test_writers_and_deleters_of_one_folder_do_not_trip_over_each_other(store: LocalStore) -> None:
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(60):
                store.put(f"attempts/1/{name}", b"x", "text/plain")
                store.delete(f"attempts/1/{name}")
        except BaseException as error:  # noqa: BLE001  - a thread's error must reach the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_folder_that_appears_and_goes_while_it_is_made_is_made_again(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, calls = Path.mkdir, []

    def raced(path: Path, *args: Any, **options: Any) -> None:
        calls.append(path.name)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", raced)
    store.put("folder/a", b"x", "text/plain")
    assert calls == ["folder", "folder"]
    assert store.get("folder/a") == b"x"
    (root / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        store.put("file/a", b"x", "text/plain")


def test_a_write_that_fails_leaves_nothing(store: LocalStore, root: Path) -> None:
    store.put(KEY, b"old", "text/plain")
    with pytest.raises(OverflowError):
        store.put(KEY, b"new", "t/" + "x" * 300)
    (root / "folder").mkdir()
    with pytest.raises(OSError, match="folder") as failure:
        store.put("folder", b"new", "text/plain")
    assert failure.value.errno in {errno.EISDIR, errno.ENOTEMPTY}
    assert store.get(KEY) == b"old"
    assert list((root / ".tmp").iterdir()) == []


def test_a_file_of_unknown_origin_is_not_served(store: LocalStore, root: Path) -> None:
    (root / "stranger").write_bytes(b"some text")
    with pytest.raises(OSError, match="not written by this store"):
        store.get("stranger")


def test_it_opens_by_url(tmp_path: Path) -> None:
    store = open_store((tmp_path / "a folder").as_uri())
    store.put("a", b"x", "text/plain")
    assert (tmp_path / "a folder" / "a").is_file()


@pytest.mark.parametrize("url", ["file://host/folder", "file:relative", "s4://bucket", "", "file:///proc/nowhere"])
def test_an_unusable_url_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match="storage"):
        open_store(url)
