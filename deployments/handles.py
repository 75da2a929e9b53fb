"""RayBackend: ``serve_app.backend.Backend`` over deployment handles, and Ray's errors translated into ours."""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve_app import errors
from serve_app.backend import Annotation, BackendStats
from serve_app.config import AppConfig
from serve_app.tasks import (
    AnnotationTask,
    AttemptRef,
    GenerationResult,
    GenerationTask,
    ImageArray,
    MapOutput,
    OutputOptions,
)

logger = logging.getLogger(__name__)

BROADCAST_TIMEOUT_S = 2.0

NODE_DEATH = "its node has died"
"""Ray tells a lost node from a lost process only in this sentence of its error's text."""

MEANINGS: tuple[tuple[tuple[type[BaseException], ...], type[errors.ServeError]], ...] = (
    ((ActorDiedError, WorkerCrashedError, OutOfMemoryError), errors.WorkerLost),
    ((ObjectLostError,), errors.InputLost),
    # Unavailable, draining, back pressure, a replica that was shut down: nobody's fault. A cancelled call is one of
    # them unless it was this backend that cancelled it.
    ((RayError, RayServeException, asyncio.CancelledError), errors.WorkerBusy),
)
"""The first row that fits decides."""

KNOWN = (errors.ServeError, RayError, RayServeException, asyncio.CancelledError)


def translate(error: BaseException) -> errors.ServeError:
    """What Ray raised, as one of our errors. Our own error, wrapped by Ray on its way, comes out as itself."""
    if isinstance(error, RayTaskError):
        # Something the replica raised. Ray's own errors in there (a lost argument) mean the same as outside.
        return translate(error.cause) if isinstance(error.cause, KNOWN) else _unexpected(error)
    if isinstance(error, errors.ServeError):
        return error
    if isinstance(error, ActorDiedError) and NODE_DEATH in str(error):
        return errors.WorkerBusy("The node of the replica was lost.")
    for kinds, meaning in MEANINGS:
        if isinstance(error, kinds):
            return meaning(f"{meaning.__doc__} ({type(error).__name__})")
    return _unexpected(error)


def _unexpected(error: BaseException) -> errors.JobError:
    logger.error("a handle call ended in an unexpected error", exc_info=error)
    return errors.JobError("Internal error while the job ran.")


class RayBackend:
    """See ``serve_app.backend.Backend`` for the contract of each method."""

    def __init__(
        self, config: AppConfig, annotator: DeploymentHandle, denoisers: Mapping[str, DeploymentHandle]
    ) -> None:
        """``denoisers``: deployment name -> handle."""
        self._config = config
        self._annotator = annotator
        self._denoisers = denoisers
        self._running: dict[AttemptRef, DeploymentResponse] = {}
        self._cancelled: set[AttemptRef] = set()

    async def annotate(
        self,
        task: AnnotationTask,
        image: ImageArray,
        mask: ImageArray | None = None,
        output: MapOutput | None = None,
    ) -> Annotation:
        # The map itself stays in the object store of the annotator's node: only its reference comes back.
        info, (reference,) = await self._await(self._annotator.annotate.remote(task, image, mask, output))
        return Annotation(info, reference)

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None = None,
        mask: ImageArray | None = None,
        maps: Sequence[Annotation] = (),
    ) -> GenerationResult:
        handle = self._denoisers[self._config.denoiser_for(task.family).name]
        # References are resolved on the replica only as top-level arguments.
        references = [annotation.handle for annotation in maps]
        response = handle.generate.remote(ref, task, output, init_image, mask, *references)
        self._running[ref] = response
        try:
            result: GenerationResult = await self._await(response)
        except errors.WorkerBusy:
            if ref in self._cancelled:
                raise errors.Cancelled from None
            raise
        finally:
            self._running.pop(ref, None)
            self._cancelled.discard(ref)
        return result

    async def cancel(self, ref: AttemptRef) -> None:
        response = self._running.get(ref)
        if response is not None:
            self._cancelled.add(ref)
            response.cancel()

    async def progress(self, refs: Collection[AttemptRef]) -> Mapping[AttemptRef, float]:
        running = tuple(ref for ref in refs if ref in self._running)
        if not running:
            return {}
        answers = await asyncio.gather(
            *(self._broadcast(handle, "progress", running) for handle in self._denoisers.values())
        )
        return {ref: share for answer in answers for part in answer for ref, share in part.items()}

    async def stats(self) -> BackendStats:
        denoisers, annotators = await asyncio.gather(
            asyncio.gather(*(self._broadcast(handle, "stats") for handle in self._denoisers.values())),
            self._broadcast(self._annotator, "stats"),
        )
        return BackendStats(
            denoisers=tuple(stats for group in denoisers for stats in group), annotators=tuple(annotators)
        )

    async def capacity(self) -> int:
        return sum(denoiser.capacity for denoiser in self._config.denoisers)

    @staticmethod
    async def _await(response: DeploymentResponse) -> Any:
        try:
            return await response
        except asyncio.CancelledError:
            # The waiting task was cancelled: the replica must not go on for nobody.
            response.cancel()
            raise
        except Exception as error:
            raise translate(error) from error

    @staticmethod
    async def _broadcast(handle: DeploymentHandle, method: str, *args: object) -> list[Any]:
        """What every replica answers that does so in time."""
        try:
            response = handle.broadcast(method, *args)
            answers = await response.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException):
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]
