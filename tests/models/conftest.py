import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.database import Database
from serve_app.models.catalog import Catalog
from support.built import build_base, build_net


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``net`` of one family, made once; tests that change them take copies."""
    folder = tmp_path_factory.mktemp("built")
    build_base(folder / "base")
    build_net(folder / "net")
    return folder


@pytest.fixture
def base(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "base", tmp_path / "base"))


@pytest.fixture
def net(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built / "net", tmp_path / "net"))


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    database = Database(f"sqlite:///{tmp_path / 'models.sqlite3'}")
    database.migrate()
    yield Catalog(database)
    database.close()
