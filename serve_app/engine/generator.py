"""ImageGenerator: a task in, stored pictures out. What a denoiser replica and the local backend are made of.

Finds the models, hands the request to the engine's thread, and encodes and stores the pictures in a thread pool, so
that neither the event loop nor the engine waits for a PNG.
"""

import asyncio
import base64
import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch

from serve_app.backend import DenoiserStats
from serve_app.config import DenoiserConfig
from serve_app.engine.driver import Drawn, EngineDriver
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, check_families
from serve_app.errors import Cancelled, OutOfMemory, RetryableError, WorkerBusy, WorkerLost
from serve_app.images import encode_png
from serve_app.metrics import Meter
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.storage import ObjectStore
from serve_app.tasks import AttemptRef, ControlMap, GenerationResult, GenerationTask, ImageArray, OutputOptions

_STALE_S = 600.0
"""One forward that takes longer than this will not end. The engine's heart beats after every forward; the longest is
one of the UNet, for SD 1.5 about 0.8 TFLOP a row at 512x512. The default 16 rows of it are 13 TFLOP, which a processor
that does 22 GFLOP/s, less than one core of today, ends in time. Whoever serves larger pictures on a CPU lowers
``max_rows`` or ``max_latent_area``; a GPU is three orders of magnitude away."""


class ComponentSource(Protocol):
    """Where loaded models come from: ``serve_app.models.cache.ComponentCache``. A context holds its model in memory."""

    @property
    def device(self) -> torch.device: ...

    async def base(self, model_id: str, /) -> AbstractContextManager[BaseComponents]:
        """Raises ModelError, RetryableError; WorkerLost means that the device is unusable from here on."""
        ...

    async def net(self, net_id: str, /) -> AbstractContextManager[NetComponents]:
        """As ``base``."""
        ...

    def loaded(self) -> tuple[str, ...]: ...

    def release_unused(self) -> None:
        """Give up what nobody holds, for the device ran out of memory."""
        ...


class ImageGenerator:
    """One engine on one device, and what surrounds it."""

    def __init__(
        self,
        config: DenoiserConfig,
        cache: ComponentSource,
        store: ObjectStore,
        meter: Meter,
        replica: str,
        node: str,
    ) -> None:
        self._config = config
        self._cache = cache
        self._store = store
        self._replica = replica
        self._node = node
        self._engine = Engine(config, meter)
        self._driver = EngineDriver(self._engine)
        self._writers = ThreadPoolExecutor(config.encode_workers, thread_name_prefix="write-picture")
        self._calls: dict[tuple[int, int], set[asyncio.Event]] = {}
        self._generate_calls = 0
        self._loading = 0
        self._broken: WorkerLost | None = None

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None,
        mask: ImageArray | None,
        maps: Sequence[ControlMap],
    ) -> GenerationResult:
        """Draw the pictures of ``task`` and store them under ``ref.name``; arguments as in ``Backend.generate``.

        If the awaiting task is cancelled, so is the request, at its next step boundary.

        Raises:
            JobError: the task cannot be done.
            Cancelled: ``cancel`` was called for this attempt.
            RetryableError: the engine closed or ran out of memory, the device broke, or a disk or database failed.
        """
        arrived = time.monotonic()
        self._generate_calls += 1
        cancelled = asyncio.Event()
        key = (ref.job_id, ref.attempt)
        self._calls.setdefault(key, set()).add(cancelled)
        try:
            request, drawn = await self._draw(ref, task, init_image, mask, tuple(maps), cancelled)
            keys = await self._write(ref, output, drawn.pictures)
            _stop_if(cancelled)
        finally:
            self._calls[key].discard(cancelled)
            if not self._calls[key]:
                del self._calls[key]
        return GenerationResult(
            keys=keys,
            model_hash=request.base.hash,
            net_hashes=tuple(net.hash for net in request.nets),
            unet_forwards=drawn.unet_forwards,
            mean_rows=drawn.mean_rows,
            queue_s=drawn.started_at - arrived,
            run_s=time.monotonic() - drawn.started_at,
        )

    async def cancel(self, ref: AttemptRef) -> None:
        """Stop an attempt, wherever it is: loading, waiting, running or being stored. Unknown ones are ignored."""
        for cancelled in self._calls.get((ref.job_id, ref.attempt), ()):
            cancelled.set()
        self._driver.cancel(ref)

    def progress(self, refs: Collection[AttemptRef]) -> dict[AttemptRef, float]:
        """How far those of ``refs`` are that run here; see ``Backend.progress``."""
        running = self._driver.progress
        return {ref: running[ref.job_id, ref.attempt] for ref in refs if (ref.job_id, ref.attempt) in running}

    def stats(self) -> DenoiserStats:
        return DenoiserStats(
            replica=self._replica,
            node=self._node,
            pid=os.getpid(),
            device=str(self._cache.device),
            families=self._config.families,
            running=self._engine.running,
            waiting=self._loading + self._driver.waiting,
            max_rows=self._config.max_rows,
            deterministic=self._config.deterministic is not False,
            unet_forwards=self._engine.unet_forwards,
            unet_rows=self._engine.unet_rows,
            generate_calls=self._generate_calls,
            models=self._cache.loaded(),
        )

    def check_health(self) -> None:
        """Raises RuntimeError if the device broke, or the engine's thread is dead or stuck."""
        if self._broken is not None:
            raise RuntimeError(self._broken.message)
        problem = health_problem(self._driver.alive, self._driver.death, time.monotonic() - self._driver.heartbeat)
        if problem is not None:
            raise RuntimeError(problem)

    async def close(self) -> None:
        """Stop the engine after the step that runs and wait for pictures being stored."""
        await asyncio.to_thread(self._driver.close)
        await asyncio.to_thread(self._writers.shutdown)

    async def _draw(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        init_image: ImageArray | None,
        mask: ImageArray | None,
        maps: tuple[ControlMap, ...],
        cancelled: asyncio.Event,
    ) -> tuple[GenerationRequest, Drawn]:
        """Load, then run. The models are leased until the engine has let go of the request, however this call ends."""
        with ExitStack() as leases:
            request = await self._resolve(leases, ref, task, init_image, mask, maps)
            _stop_if(cancelled)
            running = asyncio.wrap_future(self._driver.submit(request))
            held = leases.pop_all()

        def let_go(future: "asyncio.Future[Drawn]") -> None:
            # The error is retrieved here, for nobody may be left to await it.
            if not future.cancelled() and isinstance(future.exception(), OutOfMemory):
                self._cache.release_unused()  # while this request still holds its own: the next attempt needs them
            held.close()

        running.add_done_callback(let_go)
        try:
            return request, await asyncio.shield(running)
        except asyncio.CancelledError:
            self._driver.cancel(ref)
            raise

    async def _resolve(
        self,
        leases: ExitStack,
        ref: AttemptRef,
        task: GenerationTask,
        init_image: ImageArray | None,
        mask: ImageArray | None,
        maps: tuple[ControlMap, ...],
    ) -> GenerationRequest:
        if self._broken is not None:
            raise WorkerBusy("This replica's device broke; it is being replaced.")
        self._loading += 1
        try:
            base = leases.enter_context(await self._cache.base(task.model))
            nets = []
            for control in task.controls:
                nets.append(leases.enter_context(await self._cache.net(control.net)))
                check_families(base, nets)
        except WorkerLost as error:
            self._broken = error
            raise
        except OutOfMemory:
            self._cache.release_unused()
            raise
        finally:
            self._loading -= 1
        return GenerationRequest(ref, task, base, tuple(nets), init_image, mask, maps)

    async def _write(self, ref: AttemptRef, output: OutputOptions, pictures: Sequence[ImageArray]) -> tuple[str, ...]:
        keys = tuple(f"{ref.name}/{output.file_name(index)}" for index in range(len(pictures)))
        writing = [
            self._writers.submit(_store, self._store, key, picture, output.base64_text)
            for key, picture in zip(keys, pictures, strict=True)
        ]
        try:
            await asyncio.gather(*(asyncio.wrap_future(one) for one in writing))
        except OSError as error:
            raise RetryableError(f"The pictures could not be stored: {error}") from error
        finally:
            await _settled(writing)
        return keys


async def _settled(writing: "Sequence[Future[None]]") -> None:
    """Returns when none is being written any more, however often the caller is cancelled meanwhile.

    Whoever hears that an attempt failed or was cancelled deletes its files: none may appear after that.
    """
    running = [one for one in writing if not one.cancel() and not one.done()]
    if not running:
        return
    ended = asyncio.ensure_future(asyncio.to_thread(wait, running))
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def health_problem(alive: bool, death: BaseException | None, silent_s: float) -> str | None:
    """Why an engine thread counts as broken, or None: slow is healthy, up to ``_STALE_S`` in one step."""
    if not alive:
        return f"the engine's thread is dead: {death!r}"
    return f"the engine has been in one step for {silent_s:.0f} s" if silent_s > _STALE_S else None


def _store(store: ObjectStore, key: str, picture: ImageArray, base64_text: bool) -> None:
    data = encode_png(picture)
    if base64_text:
        store.put(key, base64.b64encode(data), "text/plain")
    else:
        store.put(key, data, "image/png")


def _stop_if(cancelled: asyncio.Event) -> None:
    if cancelled.is_set():
        raise Cancelled
