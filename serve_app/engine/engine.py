"""The engine: requests join and leave a running batch at every step boundary.

A step is plan, run, update. Between the steps of others a request is encoded, gets its rows in every forward that the
plan gives it, and has its pictures decoded. The engine is used from one thread; ``driver.py`` owns that thread.
"""

import gc
import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from serve_app.config import DenoiserConfig
from serve_app.engine.batching import Budget, Candidate, Planner
from serve_app.engine.decode import decode
from serve_app.engine.denoise import Predictions, predict
from serve_app.engine.encode import prepare
from serve_app.engine.prompts import PromptEncoder
from serve_app.engine.request import Ended, GenerationRequest, Picture, RunningRequest, Seat
from serve_app.errors import Cancelled, JobError, OutOfMemory, RetryableError, ServeError, WorkerLost
from serve_app.metrics import Meter
from serve_app.models.device_errors import is_out_of_memory
from serve_app.tasks import AttemptRef

_JOINS_PER_STEP = 4
"""Requests encoded between two steps at most, so that a burst of arrivals does not hold up who runs."""

logger = logging.getLogger(__name__)


class Engine:
    """Row-level continuous batching over the requests of one device."""

    def __init__(self, config: DenoiserConfig, meter: Meter) -> None:
        self._budget = Budget(config.max_rows, config.max_latent_area, config.deterministic)
        self._planner = Planner(self._budget)
        self._max_running = config.max_running
        self._meter = meter
        self._prompts = PromptEncoder()
        self._waiting: deque[GenerationRequest] = deque()
        self._running: list[RunningRequest] = []
        self._ended: list[Ended] = []
        self._turn = 0
        self._short_of_memory = False
        self.unet_forwards = 0
        self.unet_rows = 0
        self.heartbeat = time.monotonic()
        """When the engine last got on, by ``time.monotonic``: a request was encoded, a net or the UNet was run."""

    @property
    def running(self) -> int:
        """Requests that hold engine state."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that wait for engine state."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._ended or self._short_of_memory)

    @property
    def progress(self) -> dict[tuple[int, int], float]:
        """By job id and attempt, how far each running request is, 0 to 1; it never falls.

        For other threads, at any time and without a lock: a step writes one number per picture and keeps no books.
        """
        running = tuple(self._running)  # a copy in one go: the engine's thread changes the list
        return {(each.request.ref.job_id, each.request.ref.attempt): each.progress for each in running}

    def add(self, request: GenerationRequest) -> None:
        """Put a request at the end of the waiting line.

        Raises:
            JobError: one picture of it is larger than the largest forward allowed here.
        """
        if self._budget.rows(*request.latent_size) < request.rows:
            raise JobError(
                f"{request.task.width}x{request.task.height} is too large for this server: a picture takes "
                f"{request.rows} rows of one step and fewer fit."
            )
        self._waiting.append(request)

    def cancel(self, ref: AttemptRef) -> None:
        """Take an attempt out, waiting or running; the next step reports it. Unknown attempts are ignored."""

        def meant(request: GenerationRequest) -> bool:
            return (request.ref.job_id, request.ref.attempt) == (ref.job_id, ref.attempt)

        for request in [request for request in self._waiting if meant(request)]:
            self._waiting.remove(request)
            self._end(request, Cancelled())
        for running in [running for running in self._running if meant(running.request)]:
            self._leave(running, Cancelled())

    @torch.inference_mode()
    def step(self) -> list[Ended]:
        """One forward for the pictures whose turn it is; returns the requests that ended since the last step.

        Raises:
            torch.AcceleratorError: the device is unusable from here on; so is the engine.
        """
        seats = self._plan()
        predictions = self._run(seats)
        return self._update(seats, predictions)

    def _plan(self) -> list[Seat]:
        self._turn += 1
        self._free_memory()
        self._admit()
        waiting = [
            Seat(running, picture, picture.call)
            for running in self._running
            for picture in running.pictures
            if picture.call is not None
        ]
        candidates = [Candidate(seat.running.group, seat.rows, seat.picture.served) for seat in waiting]
        return [waiting[index] for index in self._planner.plan(candidates)]

    def _run(self, seats: Sequence[Seat]) -> Predictions | None:
        """The forward; None where there is nothing to predict or it failed, and with it every request in it."""
        predictions = None
        if seats:
            pinned_rows = self._budget.pinned_rows(*seats[0].running.request.latent_size)
            with self._blame(*_distinct(seats)):
                predictions = predict(seats, self._beat, pad_to=pinned_rows)
        self._beat()
        return predictions

    def _update(self, seats: Sequence[Seat], predictions: Predictions | None) -> list[Ended]:
        if predictions is not None:
            self._count(seats, predictions)
            for seat, guided in zip(seats, predictions.guided, strict=True):
                if seat.running in self._running:
                    with self._blame(seat.running):
                        seat.picture.advance(guided, self._turn)
        self._decode_one()
        for running in [running for running in self._running if running.done]:
            self._leave(running, None)
        self._meter.set("requests_running", self.running)
        self._meter.set("requests_waiting", self.waiting)
        ended, self._ended = self._ended, []
        return ended

    def _admit(self) -> None:
        """Let waiting requests join in the order of their arrival, encoded one by one."""
        for _ in range(_JOINS_PER_STEP):
            if not self._waiting or not self._may_join(self._waiting[0]):
                return
            request = self._waiting.popleft()
            try:
                self._running.append(prepare(request, self._prompts, self._turn))
            except Exception as error:  # noqa: BLE001  - a request that cannot be encoded fails alone
                self._end(request, _translated(error, shared=False))
            self._beat()

    def _may_join(self, head: GenerationRequest) -> bool:
        """First come, first served, also for a request that runs alone: it waits until everybody before it has left,
        and everybody behind it waits until it has."""
        if not self._running:
            return True
        alone = head.ref.alone or self._running[0].request.ref.alone
        return not alone and len(self._running) < self._max_running

    def _decode_one(self) -> None:
        for running, picture, latent in self._finished():
            with self._blame(running):
                picture.pixels = decode(running.request.base, latent)
            return

    def _finished(self) -> Iterator[tuple[RunningRequest, Picture, Tensor]]:
        for running in self._running:
            for picture in running.pictures:
                if picture.latent is not None and picture.pixels is None:
                    yield running, picture, picture.latent

    def _count(self, seats: Sequence[Seat], predictions: Predictions) -> None:
        model = seats[0].running.request.base.id
        self.unet_forwards += 1
        self.unet_rows += predictions.rows
        self._meter.count("unet_forwards", model=model)
        self._meter.count("unet_rows", predictions.rows, model=model)
        for net in predictions.nets:
            self._meter.count("controlnet_forwards", net=net)
        for running in _distinct(seats):
            running.forwards += 1
            running.forward_rows += predictions.rows

    @contextmanager
    def _blame(self, *requests: RunningRequest) -> Iterator[None]:
        """Whatever goes wrong inside ends these requests, and no others."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  - models may raise anything, and the batch must go on
            failure = _translated(error, shared=len(requests) > 1)
            for running in requests:
                self._leave(running, failure)

    def _leave(self, running: RunningRequest, error: ServeError | None) -> None:
        self._running.remove(running)
        self._end(running.request, running if error is None else error)

    def _end(self, request: GenerationRequest, outcome: RunningRequest | ServeError) -> None:
        self._short_of_memory |= isinstance(outcome, OutOfMemory)
        self._ended.append(Ended(request, outcome))

    def _beat(self) -> None:
        self.heartbeat = time.monotonic()

    def _free_memory(self) -> None:
        """After an OutOfMemory, once the frames of the failed step are gone: give back what they held."""
        if self._short_of_memory:
            self._short_of_memory = False
            self._prompts.clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _distinct(seats: Sequence[Seat]) -> list[RunningRequest]:
    return list({id(seat.running): seat.running for seat in seats}.values())


def _translated(error: Exception, *, shared: bool) -> ServeError:
    """What the caller is told. Keeps no reference to ``error``: its frames hold the tensors of the failed forward.

    Which request broke a shared forward is unknown, so all of them may run again, as suspects, alone.

    Raises:
        torch.AcceleratorError: ``error`` itself; after it no call to the device succeeds.
    """
    if isinstance(error, ServeError) and (not shared or isinstance(error, RetryableError)):
        return error.with_traceback(None)
    if is_out_of_memory(error):
        return OutOfMemory(str(error))
    if isinstance(error, torch.AcceleratorError):
        raise error
    logger.error("a request failed in the engine", exc_info=error)
    what = f"{type(error).__name__}: {error}"
    return WorkerLost(f"A step shared with other requests failed: {what}") if shared else JobError(what)
