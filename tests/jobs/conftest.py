"""A job store on SQLite, and on both databases where a promise is about SQL."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.postgres import new_database

from serve_app.config import LimitsConfig
from serve_app.database import Database
from serve_app.jobs.store import JobStore
from serve_app.storage.local import LocalStore


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/jobs.sqlite3"
    else:
        url = new_database(request.getfixturevalue("postgres_url"))
    database = Database(url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/jobs.sqlite3")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def any_store(any_database: Database) -> JobStore:
    return JobStore(any_database, LimitsConfig())


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database, LimitsConfig())


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects")


@pytest.fixture
def stored(tmp_path: Path) -> Callable[[], set[str]]:
    """The keys of all objects in ``objects``."""
    root = tmp_path / "objects"
    return lambda: {
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and ".tmp" not in path.parts
    }
