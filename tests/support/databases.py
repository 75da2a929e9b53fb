"""Empty databases with every migration: SQLite, and both where a promise is about SQL."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve_app.database import Database
from support.postgres import new_database


@contextmanager
def _migrated(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/test.sqlite3"
    else:
        url = new_database(request.getfixturevalue("postgres_url"))
    with _migrated(url) as database:
        yield database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with _migrated(f"sqlite:///{tmp_path}/test.sqlite3") as database:
        yield database
