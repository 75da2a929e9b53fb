"""LocalBackend: annotators and engine in this process. Tests, the command line and a laptop without Ray use it.

``LocalServer`` adds the dispatcher and the HTTP application, so that the whole story of a job runs in one process.
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from serve_app.annotators.service import AnnotatorService, open_annotators
from serve_app.api.application import build_application
from serve_app.api.services import Services
from serve_app.backend import Annotation, Backend, BackendStats
from serve_app.config import AppConfig
from serve_app.engine.generator import ImageGenerator
from serve_app.fetching import GuardedClient
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.lifecycle import JobWaiter
from serve_app.metrics import Meter, PrometheusMeter
from serve_app.models.cache import open_cache
from serve_app.models.catalog import Catalog
from serve_app.models.publish import publish_all
from serve_app.resources import Resources, open_resources
from serve_app.storage import ObjectStore
from serve_app.tasks import (
    AnnotationTask,
    AttemptRef,
    ControlMap,
    GenerationResult,
    GenerationTask,
    ImageArray,
    MapOutput,
    OutputOptions,
)


class LocalBackend:
    """See ``serve_app.backend.Backend`` for the contract of each method."""

    def __init__(
        self, config: AppConfig, catalog: Catalog, objects: ObjectStore, annotators: AnnotatorService, meter: Meter
    ) -> None:
        """``annotators`` is closed with this backend."""
        self._config = config
        self._annotators = annotators
        self._caches = {own.name: open_cache(own, catalog) for own in config.denoisers}
        self._generators = {
            own.name: ImageGenerator(own, self._caches[own.name], objects, meter, own.name, socket.gethostname())
            for own in config.denoisers
        }

    async def annotate(
        self,
        task: AnnotationTask,
        image: ImageArray,
        mask: ImageArray | None = None,
        output: MapOutput | None = None,
    ) -> Annotation:
        control_map, info = await self._annotators.annotate(task, image, mask, output)
        return Annotation(info, control_map)

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None = None,
        mask: ImageArray | None = None,
        maps: Sequence[Annotation] = (),
    ) -> GenerationResult:
        generator = self._generators[self._config.denoiser_for(task.family).name]
        arrays: list[ControlMap] = [annotation.handle for annotation in maps]  # type: ignore[misc]  # our own arrays
        return await generator.generate(ref, task, output, init_image, mask, arrays)

    async def cancel(self, ref: AttemptRef) -> None:
        for generator in self._generators.values():
            await generator.cancel(ref)

    async def progress(self, refs: Collection[AttemptRef]) -> Mapping[AttemptRef, float]:
        return {
            ref: share for generator in self._generators.values() for ref, share in generator.progress(refs).items()
        }

    async def stats(self) -> BackendStats:
        here = await asyncio.to_thread(self._annotators.stats, "local", socket.gethostname())
        return BackendStats(
            denoisers=tuple(generator.stats() for generator in self._generators.values()), annotators=(here,)
        )

    async def capacity(self) -> int:
        return sum(own.max_ongoing for own in self._config.denoisers)

    async def close(self) -> None:
        for generator in self._generators.values():
            await generator.close()
        for cache in self._caches.values():
            cache.close()
        await self._annotators.close()


@dataclass(frozen=True, slots=True)
class LocalServer:
    """One process that does everything; ``application`` is the ASGI app to serve or to call."""

    resources: Resources
    backend: Backend
    dispatcher: Dispatcher
    application: FastAPI


@asynccontextmanager
async def local_server(
    config: AppConfig, backend: Backend | None = None, meter: Meter | None = None
) -> AsyncIterator[LocalServer]:
    """Open the resources, publish the models and run a dispatcher for as long as the context lasts.

    ``backend``: another backend than this process; it stays its owner's to close.
    """
    meter = meter or PrometheusMeter()
    resources = await asyncio.to_thread(open_resources, config)
    await asyncio.to_thread(publish_all, config, resources.catalog)
    own = None
    if backend is None:
        annotators = open_annotators(config, resources.database, resources.objects, meter)
        own = LocalBackend(config, resources.catalog, resources.objects, annotators, meter)
    used: Backend = backend or own  # type: ignore[assignment]  # one of the two is there
    client = GuardedClient(config.fetch)
    dispatcher = Dispatcher(config, resources.jobs, resources.objects, used, client, meter, f"local-{os.getpid()}")

    async def nudge() -> None:
        dispatcher.nudge()

    application = build_application(
        Services(
            config=config,
            jobs=resources.jobs,
            waiter=JobWaiter(resources.jobs),
            keys=resources.keys,
            catalog=resources.catalog,
            objects=resources.objects,
            backend_stats=used.stats,
            nudge=nudge,
        )
    )
    loop = asyncio.create_task(dispatcher.run())
    try:
        yield LocalServer(resources, used, dispatcher, application)
    finally:
        await dispatcher.stop(config.dispatcher.graceful_shutdown_timeout_s)
        await loop
        await client.aclose()
        if own is not None:
            await own.close()
        resources.database.close()
