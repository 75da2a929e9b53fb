"""What the annotator replicas lack, as a gateway knows it."""

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from serve_app.backend import BackendStats

logger = logging.getLogger(__name__)

FRESH_S: Final = 10.0
"""How old an answer may be that is used: weights are fetched while the cluster runs."""
PATIENCE_S: Final = 2.5
"""How long a request waits for an answer. Backends give each replica 2 s: one that hangs must not hide the others."""


@dataclass(frozen=True, slots=True)
class ReadinessReport:
    """What the replicas that answered lack. Without an answer nothing is known, which is not the same as ready."""

    missing: Mapping[str, str] | None
    """Annotator -> what it lacks, on one replica or more; None: no replica has answered."""

    def ready(self, annotator: str) -> bool | None:
        """Whether the annotator lacks nothing; None: not known."""
        return None if self.missing is None else annotator not in self.missing

    def lacks(self, annotator: str) -> str | None:
        """What the annotator is known to lack."""
        return None if self.missing is None else self.missing.get(annotator)


@dataclass(slots=True)
class AnnotatorReadiness:
    """Asks the replicas, once for all requests that want to know at the same time. One per gateway process."""

    clock: Callable[[], float] = time.monotonic
    patience_s: float = PATIENCE_S
    _known: ReadinessReport = ReadinessReport(None)
    _known_at: float = 0.0
    _asking: set[asyncio.Task[None]] = field(default_factory=set)

    async def state(self, stats: Callable[[], Awaitable[BackendStats]]) -> ReadinessReport:
        """What the replicas said within the last 10 s; else they are asked, for at most 2.5 s. Never raises."""
        if self._now().missing is None:
            if not self._asking:
                self._start(stats)
            await asyncio.wait(self._asking, timeout=self.patience_s)
        return self._now()

    def learn(self, stats: BackendStats) -> ReadinessReport:
        """What replicas say in ``stats``, which were asked for just now; without a word from them what is known."""
        self._take(stats, self.clock())
        return self._now()

    def _now(self) -> ReadinessReport:
        return self._known if self.clock() - self._known_at <= FRESH_S else ReadinessReport(None)

    def _take(self, stats: BackendStats, asked_at: float) -> None:
        if stats.annotators:
            found = {name: reason for one in stats.annotators for name, reason in one.missing.items()}
            self._known, self._known_at = ReadinessReport(found), asked_at

    def _start(self, stats: Callable[[], Awaitable[BackendStats]]) -> None:
        # In a context of its own: Serve cancels the calls of a request whose client hangs up, and others wait here too.
        task = asyncio.create_task(self._ask(stats), name="annotator-readiness", context=contextvars.Context())
        self._asking.add(task)
        task.add_done_callback(self._asked)

    async def _ask(self, stats: Callable[[], Awaitable[BackendStats]]) -> None:
        asked_at = self.clock()
        self._take(await stats(), asked_at)

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("the annotators could not be asked what they lack", exc_info=error)
