"""A job store on SQLite, and on both databases where a promise is about SQL."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry

from serve_app.config import LimitsConfig
from serve_app.database import Database
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.store import JobStore
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from support.backend import ScriptedBackend
from support.dispatch import SECRET, Start, running
from support.web import WebServer, web_server


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


@pytest.fixture
def backend(objects: LocalStore) -> ScriptedBackend:
    return ScriptedBackend(objects)


@pytest.fixture
async def web() -> AsyncIterator[WebServer]:
    async with web_server() as web:
        yield web


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def start(store: JobStore, objects: LocalStore, backend: ScriptedBackend, registry: CollectorRegistry) -> Start:
    meter = PrometheusMeter(registry)

    @asynccontextmanager
    async def start(name: str = "one", **settings: float) -> AsyncIterator[Dispatcher]:
        async with running(store, objects, backend, meter, name, **settings) as dispatcher:
            yield dispatcher

    return start


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEBHOOK_SECRET", SECRET)


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    return (tmp_path / "a.png").read_bytes()
