"""What the HTTP side works with, handed in by whoever starts it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from serve_app.api.readiness import AnnotatorReadiness
from serve_app.backend import BackendStats
from serve_app.config import AppConfig
from serve_app.jobs.lifecycle import JobWaiter
from serve_app.jobs.store import JobStore
from serve_app.keys import KeyStore
from serve_app.models.catalog import Catalog
from serve_app.storage import ObjectStore

DECODES_AT_ONCE = 2
"""A picture at the pixel limit takes 120 MB while it is checked."""


@dataclass(frozen=True, slots=True)
class Services:
    """The collaborators of one gateway process."""

    config: AppConfig
    jobs: JobStore
    waiter: JobWaiter
    keys: KeyStore
    catalog: Catalog
    objects: ObjectStore
    backend_stats: Callable[[], Awaitable[BackendStats]]
    nudge: Callable[[], Awaitable[None]]
    """Tell the dispatchers that there is work. Must not wait for them."""
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(DECODES_AT_ONCE))
    """Held while an inline picture is decoded."""
    annotators: AnnotatorReadiness = field(default_factory=AnnotatorReadiness)
    """Which annotators lack their weights."""
