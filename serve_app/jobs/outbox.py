"""Outbox: tells the owners of ended jobs, in the background. A webhook never delays, fails or refuses a job."""

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from serve_app.config import AppConfig, secret
from serve_app.jobs.answers import webhook_body
from serve_app.jobs.job import Job
from serve_app.jobs.records import UNREADABLE
from serve_app.jobs.store import JobStore
from serve_app.metrics import Meter
from serve_app.webhooks import DELIVERED, Poster, deliver, encode_body, headers, secret_bytes

logger = logging.getLogger(__name__)

_UNTOLD_S = 30.0
"""Age, beyond the time one delivery may take, at which an unsent webhook is nobody's any more."""
_SWEEP_AT_ONCE = 20


class Outbox:
    """Raises ConfigError when the signing secret is named but missing or malformed."""

    def __init__(self, config: AppConfig, store: JobStore, poster: Poster, meter: Meter) -> None:
        signing = secret(config.webhooks.secret_env)
        self._key = secret_bytes(signing) if signing is not None else None
        self._timeout_s = config.webhooks.timeout_s
        self._public_url = config.public_url
        self._store = store
        self._poster = poster
        self._meter = meter
        self._sending: dict[int, asyncio.Task[None]] = {}

    def send(self, job: Job) -> None:
        """Deliver the webhook of an ended job, if it has one."""
        if job.spec.webhook is None:
            return
        task = asyncio.get_running_loop().create_task(self._send(job, job.spec.webhook), name=f"webhook-{job.id}")
        self._sending[job.id] = task
        task.add_done_callback(lambda _: self._sending.pop(job.id, None))

    async def sweep(self) -> None:
        """Send what was left unsent: by a dispatcher that died, or because the job was cancelled in the queue.

        Each is taken by one dispatcher. A webhook may be sent twice when its outcome was not recorded; its id is the
        same both times.
        """
        room = _SWEEP_AT_ONCE - len(self._sending)
        if room <= 0:
            return
        lease_s = _UNTOLD_S + self._timeout_s
        for job in await asyncio.to_thread(self._store.take_untold, lease_s, lease_s, room):
            if job.spec.webhook is None:  # written by another version: where to send it is not known
                await asyncio.to_thread(self._store.set_webhook_status, job.id, f"failed: {UNREADABLE}")
            elif job.id not in self._sending:
                self.send(job)

    async def drain(self, timeout_s: float) -> None:
        """Wait for deliveries under way; what takes longer is given up."""
        if self._sending:
            _, late = await asyncio.wait(self._sending.values(), timeout=timeout_s)
            for task in late:
                task.cancel()

    async def _send(self, job: Job, url: str) -> None:
        body = encode_body(webhook_body(job, self._public_url))
        fields = headers(f"msg_{job.id}", int(time.time()), body, self._key)
        outcome = await deliver(self._poster, url, body, fields, self._timeout_s)
        self._meter.count("webhooks", outcome=DELIVERED if outcome == DELIVERED else "failed")
        try:
            await asyncio.to_thread(self._store.set_webhook_status, job.id, outcome)
        except SQLAlchemyError:
            logger.warning("job %d: the outcome of its webhook (%s) is not recorded", job.id, outcome, exc_info=True)
