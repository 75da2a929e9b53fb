"""Dispatchers on a test's store, and waiting for what they do."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from serve_app.config import AppConfig, DispatcherConfig, WebhookConfig
from serve_app.fetching import GuardedClient
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.job import Job
from serve_app.jobs.lifecycle import JobWaiter
from serve_app.jobs.store import JobStore
from serve_app.metrics import PrometheusMeter
from serve_app.storage.local import LocalStore
from support.backend import ScriptedBackend
from support.web import LOCAL

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Start(Protocol):
    """Runs a dispatcher on the test's store; ``settings`` are those of ``DispatcherConfig``."""

    def __call__(self, name: str = ..., **settings: float) -> AbstractAsyncContextManager[Dispatcher]: ...


@asynccontextmanager
async def running(
    store: JobStore,
    objects: LocalStore,
    backend: ScriptedBackend,
    meter: PrometheusMeter,
    name: str,
    **settings: float,
) -> AsyncIterator[Dispatcher]:
    options = {"poll_s": 0.05, "lease_s": 1.0} | settings
    config = AppConfig(
        dispatcher=DispatcherConfig.model_validate(options),
        webhooks=WebhookConfig(timeout_s=2.0, secret_env="WEBHOOK_SECRET"),
    )
    async with GuardedClient(LOCAL) as client:
        dispatcher = Dispatcher(config, store, objects, backend, client, meter, name)
        loop = asyncio.create_task(dispatcher.run())
        try:
            yield dispatcher
        finally:
            await dispatcher.stop(5.0)
            await loop


async def end_of(store: JobStore, job: Job, timeout_s: float = 15.0) -> Job:
    ended = await JobWaiter(store, tick_s=0.02).wait(job.id, timeout_s)
    assert ended.status.ended, ended.status
    return ended


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        await asyncio.sleep(0.02)


def now(store: JobStore, job: Job) -> Job:
    found = store.get(job.id)
    assert found is not None
    return found
