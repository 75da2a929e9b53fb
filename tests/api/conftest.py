"""A served API on a data folder of its own per test."""

import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from serve_app.config import AppConfig
from serve_app.resources import open_resources
from support.gateway import (
    ADMIN_ONLY_KEY,
    COLLEAGUE_KEY,
    KEY,
    PUBLIC_URL,
    STRANGER_KEY,
    Open,
    Server,
    publish,
    serving,
)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with keys and a catalogue, to be copied: migrating takes longer than most tests."""
    folder = tmp_path_factory.mktemp("template")
    resources = open_resources(AppConfig(data=folder))
    resources.keys.create("one", "studio", ("generate", "admin"), KEY)
    resources.keys.create("two", "studio", ("generate",), COLLEAGUE_KEY)
    resources.keys.create("three", "elsewhere", ("generate",), STRANGER_KEY)
    resources.keys.create("four", "studio", ("admin",), ADMIN_ONLY_KEY)
    publish(resources.catalog)
    resources.database.close()
    return folder


@pytest.fixture
def open_server(tmp_path: Path, template: Path) -> Open:
    """Starts a server; arguments are sections of the configuration."""
    folder = tmp_path / "data"
    shutil.copytree(template, folder)

    def start(server: dict[str, object] | None = None, **sections: object) -> AbstractAsyncContextManager[Server]:
        defaults = {"public_url": f"{PUBLIC_URL}/", "sync_wait_s": 20}
        return serving(folder, {**sections, "server": {**defaults, **(server or {})}})

    return start


@pytest.fixture
async def server(open_server: Open) -> AsyncIterator[Server]:
    async with open_server() as running:
        yield running
