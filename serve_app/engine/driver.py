"""The engine's thread: the only one that touches the Engine, and a torch device.

Callers of any thread hand requests in and get futures. Whatever happens on the thread, every future ends: with the
pictures, or with an error of ``serve_app.errors``.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from serve_app.engine.engine import Engine
from serve_app.engine.request import Ended, GenerationRequest, RunningRequest
from serve_app.errors import RetryableError, ServeError, WorkerBusy, WorkerLost
from serve_app.tasks import AttemptRef, ImageArray

_IDLE_BEAT_S = 1.0
"""How often an idle engine shows that it is alive."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The pictures of a request and what they took."""

    pictures: tuple[ImageArray, ...]
    started_at: float
    """When it joined the batch, by ``time.monotonic``."""
    unet_forwards: int
    mean_rows: float
    """Mean number of rows in those forwards, neighbours included."""


@dataclass(frozen=True, slots=True, eq=False)
class _Submit:
    request: GenerationRequest
    future: "Future[Drawn]"


@dataclass(frozen=True, slots=True)
class _Cancel:
    ref: AttemptRef


class _Close:
    pass


class EngineDriver:
    """Runs an Engine on a thread of its own, from construction to ``close``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Close] = queue.SimpleQueue()
        self._futures: dict[GenerationRequest, Future[Drawn]] = {}
        self._lock = threading.Lock()
        self._open = True
        self._death: BaseException | None = None
        self._heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    @property
    def heartbeat(self) -> float:
        """When the thread last got on, by ``time.monotonic``: idle every second, else after every model it ran."""
        return max(self._heartbeat, self._engine.heartbeat)

    @property
    def death(self) -> BaseException | None:
        """What ended the thread, other than ``close``."""
        return self._death

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests handed in that do not hold engine state yet."""
        return self._inbox.qsize() + self._engine.waiting

    @property
    def progress(self) -> dict[tuple[int, int], float]:
        """By job id and attempt, how far each running request is, 0 to 1. Costs the engine's thread nothing."""
        return self._engine.progress

    def submit(self, request: GenerationRequest) -> "Future[Drawn]":
        """Hand a request in. The future cannot be cancelled by itself: use ``cancel``.

        Raises:
            WorkerBusy: the driver is closed or its thread has died.
        """
        future: Future[Drawn] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if not self._open:
                raise WorkerBusy("This replica is shutting down.")
            self._inbox.put(_Submit(request, future))
        return future

    def cancel(self, ref: AttemptRef) -> None:
        """Stop an attempt at the next step boundary; its future ends with Cancelled unless it is done before."""
        self._inbox.put(_Cancel(ref))

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop after the step that runs; what has not ended by then ends with WorkerBusy. May be called twice."""
        self._inbox.put(_Close())
        self._thread.join(timeout_s)

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._death = error
        finally:
            # A replica that is asked to stop is nobody's fault; one that breaks makes suspects of its requests.
            broken = WorkerLost(f"The engine stopped: {self._death!r}")
            self._fail_all(broken if self._death else WorkerBusy("The replica was stopped."))

    def _loop(self) -> None:
        while self._take_orders():
            self._report_all(self._engine.step())
            self._heartbeat = time.monotonic()

    def _take_orders(self) -> bool:
        """Carry out what came in, waiting for it while there is nothing to do; False: close.

        Holds on to no request while it waits: the request holds its model.
        """
        while True:
            try:
                if not self._carry_out(self._inbox.get(block=not self._engine.busy, timeout=_IDLE_BEAT_S)):
                    return False
            except queue.Empty:
                self._heartbeat = time.monotonic()
                if self._engine.busy:
                    return True

    def _carry_out(self, order: "_Submit | _Cancel | _Close") -> bool:
        """False: close."""
        match order:
            case _Close():
                return False
            case _Cancel(ref):
                self._engine.cancel(ref)
            case _Submit(request, future):
                self._enter(request, future)
        return True

    def _enter(self, request: GenerationRequest, future: "Future[Drawn]") -> None:
        self._futures[request] = future
        try:
            self._engine.add(request)
        except ServeError as error:
            self._report(Ended(request, error))

    def _report_all(self, those: Sequence[Ended]) -> None:
        for ended in those:
            self._report(ended)

    def _report(self, ended: Ended) -> None:
        future = self._futures.pop(ended.request)
        if isinstance(ended.outcome, ServeError):
            future.set_exception(ended.outcome)
        else:
            future.set_result(_drawn(ended.outcome))

    def _fail_all(self, error: RetryableError) -> None:
        with self._lock:
            self._open = False
        while not self._inbox.empty():
            order = self._inbox.get_nowait()
            if isinstance(order, _Submit):
                self._futures[order.request] = order.future
        for future in self._futures.values():
            future.set_exception(error)
        self._futures.clear()


def _drawn(running: RunningRequest) -> Drawn:
    return Drawn(
        pictures=tuple(picture.pixels for picture in running.pictures if picture.pixels is not None),
        started_at=running.started_at,
        unet_forwards=running.forwards,
        mean_rows=running.forward_rows / running.forwards,
    )
