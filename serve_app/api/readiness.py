"""What the annotator replicas lack, as a gateway knows it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from serve_app.backend import BackendStats

_FRESH_S: Final = 10.0
_FIRST_WAIT_S: Final = 2.0


@dataclass(slots=True)
class AnnotatorReadiness:
    """What the annotator replicas lack, asked of them at most every 10 s. One per gateway process."""

    _missing: Mapping[str, str] | None = None
    _asked_at: float = 0.0
    _asking: set[asyncio.Task[None]] = field(default_factory=set)

    async def missing(self, stats: Callable[[], Awaitable[BackendStats]]) -> Mapping[str, str]:
        """Annotator -> what it lacks, on one replica or more. Empty while no replica has told."""
        if not self._asking and (self._missing is None or time.monotonic() - self._asked_at > _FRESH_S):
            task = asyncio.create_task(self._ask(stats), name="annotator-readiness")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        if self._missing is None and self._asking:
            await asyncio.wait(self._asking, timeout=_FIRST_WAIT_S)
        return self._missing or {}

    async def _ask(self, stats: Callable[[], Awaitable[BackendStats]]) -> None:
        self._asked_at = time.monotonic()
        replicas = (await stats()).annotators
        if replicas:
            self._missing = {name: reason for replica in replicas for name, reason in replica.missing.items()}
