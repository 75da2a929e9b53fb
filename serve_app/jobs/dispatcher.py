"""Dispatcher: claims jobs and drives each as a task of its own.

Any number of dispatchers work on one database. Whatever one of them holds when it dies goes back to the queue once
the lease has run out, and any other finds it there.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from serve_app.backend import Backend
from serve_app.config import AppConfig
from serve_app.database import OUTAGES
from serve_app.errors import ServeError
from serve_app.jobs.driver import Driver, Interruption, Running
from serve_app.jobs.expressions import AttemptKey
from serve_app.jobs.lifecycle import Fetcher, Workshop, attempt_ref
from serve_app.jobs.outbox import Outbox
from serve_app.jobs.retries import ATTEMPTS_BOUND
from serve_app.jobs.store import Holding, JobStore
from serve_app.jobs.threads import StoreThreads
from serve_app.metrics import Meter
from serve_app.storage import ObjectStore
from serve_app.webhooks import Poster

logger = logging.getLogger(__name__)

_NAME_MAX = 64  # as long as its column
_RELEASE_S = 5.0
"""What ``stop`` allows for putting back jobs that did not end in time."""


class Client(Fetcher, Poster, Protocol):
    """What ``serve_app.fetching.GuardedClient`` does for jobs."""


@dataclass(slots=True)
class _Attempt:
    running: Running
    task: asyncio.Task[None]

    def interrupt(self, reason: Interruption) -> None:
        """Stop the attempt, unless it is over already."""
        if not self.running.ending and self.running.interruption is None:
            self.running.interruption = reason
            self.task.cancel()


class Dispatcher:
    """One per process; all methods belong to one event loop.

    ``name`` tells in the database who holds a job.

    Raises:
        ConfigError: the webhook secret is named but missing or malformed.
    """

    def __init__(
        self,
        config: AppConfig,
        store: JobStore,
        objects: ObjectStore,
        backend: Backend,
        client: Client,
        meter: Meter,
        name: str,
    ) -> None:
        self._config = config.dispatcher
        self._store = store
        self._backend = backend
        self._meter = meter
        self._name = name[:_NAME_MAX]
        self._threads = StoreThreads()
        self._outbox = Outbox(config, store, client, meter)
        self._driver = Driver(
            Workshop(store, objects, backend, client, config.images),
            self._threads,
            self._outbox,
            meter,
            attempt_timeout_s=config.dispatcher.attempt_timeout_s,
            max_attempts=config.dispatcher.max_attempts,
        )
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._wake = asyncio.Event()
        self._renewed = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._stopping = False
        self._stopped = asyncio.Event()

    def nudge(self) -> None:
        """There is work: look at once instead of at the next poll."""
        self._wake.set()

    async def run(self) -> None:
        """Work until ``stop``; then no attempt runs. Outages of the database or of the backend are waited out."""
        try:
            async with asyncio.TaskGroup() as group:
                keepers = (
                    group.create_task(self._watch(), name="dispatcher-watch"),
                    group.create_task(self._tidy(), name="dispatcher-tidy"),
                )
                self._worker = group.create_task(self._work(), name="dispatcher-work")
                await self._worker
                await self._stopped.wait()
                for keeper in keepers:
                    keeper.cancel()
        finally:
            await self._put_back()
            self._threads.close()

    async def stop(self, timeout_s: float) -> None:
        """Claim no more, let running attempts end for ``timeout_s``, put the others back uncharged."""
        self._stopping = True
        self._wake.set()
        deadline = time.monotonic() + timeout_s
        if self._worker is not None:  # it may be claiming
            await asyncio.wait([self._worker], timeout=timeout_s)
        await self._join(max(0.0, deadline - time.monotonic()))
        await self._put_back()
        await self._outbox.drain(_RELEASE_S)
        self._stopped.set()

    async def _put_back(self) -> None:
        """Release what still runs. No attempt of this process runs afterwards."""
        for attempt in tuple(self._attempts.values()):
            attempt.interrupt(Interruption.RELEASED)
        await self._join(_RELEASE_S)
        for attempt in tuple(self._attempts.values()):
            attempt.task.cancel()  # the database does not answer: leases will run out
        await self._join(_RELEASE_S)

    async def _join(self, timeout_s: float) -> None:
        if self._attempts:
            await asyncio.wait([attempt.task for attempt in self._attempts.values()], timeout=timeout_s)

    async def _work(self) -> None:
        while not self._stopping:
            self._wake.clear()
            await self._outlast(self._claim)
            try:
                async with asyncio.timeout(self._config.poll_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _watch(self) -> None:
        """Renew leases every third of a lease; in between look for cancellations."""
        renewal_s = self._config.lease_s / 3
        due = time.monotonic()
        while True:
            if time.monotonic() < due:
                await self._outlast(self._inspect)
            elif await self._outlast(self._renew):
                due = time.monotonic() + renewal_s
                self._renewed.set()
            await asyncio.sleep(min(self._config.poll_s, renewal_s))

    async def _tidy(self) -> None:
        """Sweep after renewals: after an outage of the database nobody shall sweep jobs of its own.

        A task of its own, because slow deletes must not delay the next renewal.
        """
        while True:
            await self._renewed.wait()
            self._renewed.clear()
            await self._outlast(self._sweep)

    async def _outlast(self, step: Callable[[], Awaitable[None]]) -> bool:
        """Whether the step went well; a database or backend that is away is logged, the next round tries again."""
        try:
            await step()
        except (*OUTAGES, ServeError):
            logger.warning("dispatcher %s: trying again in a moment", self._name, exc_info=True)
            return False
        return True

    async def _claim(self) -> None:
        room = self._config.max_jobs - len(self._attempts)
        if room <= 0:
            return
        capacity = await self._backend.capacity()
        claimed = await self._threads.run(self._store.claim, self._name, room, capacity, self._config.lease_s)
        for job in claimed:
            running = Running(job)
            task = asyncio.create_task(self._driver.drive(running), name=f"job-{job.id}-{job.attempt}")
            self._attempts[job.id, job.attempt] = _Attempt(running, task)
            task.add_done_callback(partial(self._over, (job.id, job.attempt)))

    def _over(self, key: AttemptKey, task: asyncio.Task[None]) -> None:
        del self._attempts[key]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # The lease runs out and the job is tried again, a bounded number of times.
            logger.error("%s ended unforeseen", task.get_name(), exc_info=error)

    async def _inspect(self) -> None:
        if self._attempts:
            held = dict(self._attempts)
            self._heed(held, await self._threads.run(self._store.inspect, tuple(held)))

    async def _renew(self) -> None:
        if self._attempts:
            held = dict(self._attempts)
            progress = await self._observe(held)
            self._heed(held, await self._threads.run(self._store.renew, tuple(held), self._config.lease_s, progress))

    async def _observe(self, held: Mapping[AttemptKey, _Attempt]) -> dict[AttemptKey, float]:
        """How far the attempts are. No news for whom nothing is heard of at once: leases do not wait for a backend."""
        refs = [attempt_ref(attempt.running.job) for attempt in held.values()]
        try:
            async with asyncio.timeout(self._config.lease_s / 20):
                told = await self._backend.progress(refs)
        except (ServeError, TimeoutError):
            return {}
        return {(ref.job_id, ref.attempt): share for ref, share in told.items()}

    @staticmethod
    def _heed(held: Mapping[AttemptKey, _Attempt], holding: Holding) -> None:
        for key, attempt in held.items():
            if key in holding.lost:
                attempt.interrupt(Interruption.LOST)
            elif key in holding.cancel_requested:
                attempt.interrupt(Interruption.CANCELLED)

    async def _sweep(self) -> None:
        """Take back the jobs of dead dispatchers; do what others left undone at the end of a job."""
        for job in await self._threads.run(self._store.sweep, ATTEMPTS_BOUND):
            logger.warning("job %d: the lease of attempt %d ran out, it is now %s", job.id, job.attempt, job.status)
            if job.status.ended:
                await self._driver.after_end(job.id)
            else:
                self._meter.count("jobs_retried", reason="lease_expired")
                self._wake.set()
        for job_id in await self._threads.run(self._store.inputs.left_over):
            await self._driver.drop_inputs(job_id)
        for job_id, attempt in await self._threads.run(self._store.pictures.expired):
            await self._driver.drop_pictures(job_id, attempt)
        await self._outbox.sweep()
