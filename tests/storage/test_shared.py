"""A process that sees another database or another store than the rest refuses to start."""

import threading
from pathlib import Path

import pytest

from serve_app.database import Database
from serve_app.errors import ConfigError
from serve_app.storage.local import LocalStore
from serve_app.storage.shared import MARKER, check_shared


def database(path: Path) -> Database:
    database = Database(f"sqlite:///{path}.sqlite3")
    database.migrate()
    return database


def test_the_same_pair_is_fine_again_and_again(tmp_path: Path) -> None:
    for _ in range(3):
        check_shared(database(tmp_path / "a"), LocalStore(tmp_path / "objects"))


def test_many_may_start_at_once(tmp_path: Path) -> None:
    database(tmp_path / "a").close()
    errors: list[BaseException] = []

    def start() -> None:
        try:
            check_shared(Database(f"sqlite:///{tmp_path}/a.sqlite3"), LocalStore(tmp_path / "objects"))
        except BaseException as error:  # noqa: BLE001  - a thread's error must reach the test
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_another_store_is_refused(tmp_path: Path) -> None:
    first = database(tmp_path / "a")
    check_shared(first, LocalStore(tmp_path / "objects"))
    with pytest.raises(ConfigError, match="another object store"):
        check_shared(first, LocalStore(tmp_path / "elsewhere"))


def test_another_database_is_refused_and_stays_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "objects")
    check_shared(database(tmp_path / "a"), store)
    for _ in range(2):
        with pytest.raises(ConfigError, match="another database"):
            check_shared(database(tmp_path / "b"), store)
    store.delete(MARKER)
    check_shared(database(tmp_path / "b"), store)
