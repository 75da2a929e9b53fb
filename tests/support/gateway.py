"""The whole CPU side in one process: the real application, database, store and dispatcher; only the GPUs are played.

``PaintedBackend`` implements ``Backend``: it paints a picture whose colour is the seed, so that a submit really ends
in success with a file.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from fastapi import FastAPI

from serve_app.api.application import build_application
from serve_app.api.services import Services
from serve_app.backend import Annotation, AnnotatorStats, BackendStats, DenoiserStats
from serve_app.config import AppConfig
from serve_app.errors import ServeError
from serve_app.fetching import GuardedClient
from serve_app.images import encode_png
from serve_app.jobs.dispatcher import Dispatcher
from serve_app.jobs.lifecycle import JobWaiter
from serve_app.metrics import PrometheusMeter
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.resources import Resources, open_resources
from serve_app.storage import ObjectStore
from serve_app.tasks import (
    AnnotationInfo,
    AnnotationTask,
    AttemptRef,
    GenerationResult,
    GenerationTask,
    ImageArray,
    MapOutput,
    OutputOptions,
)

KEY = "tests-generate-key-000001"
COLLEAGUE_KEY = "tests-colleague-key-00001"
STRANGER_KEY = "tests-stranger-key-000001"
ADMIN_ONLY_KEY = "tests-admin-only-key-00001"

API = "/api/v1/enterprise"
PUBLIC_URL = "http://pictures.test"

Open = Callable[..., AbstractAsyncContextManager["Server"]]


def picture(width: int = 24, height: int = 16, value: int = 128) -> bytes:
    return encode_png(np.full((height, width, 3), value, np.uint8))


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wish(**changes: object) -> dict[str, Any]:
    """A good body of ``POST controlnet``; ``changes`` replace fields, None takes them away."""
    body: dict[str, Any] = {
        "key": KEY,
        "model_id": "tiny",
        "controlnet_model": "canny",
        "prompt": "a lighthouse",
        "init_image": as_base64(picture()),
        "width": "64",
        "height": 64,
        "seed": 7,
    }
    return {name: value for name, value in {**body, **changes}.items() if value is not None}


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Returns when ``condition`` holds; the test's own time limit bounds the wait."""
    while not await condition():  # noqa: ASYNC110  - what is waited for happens in a database or another task
        await asyncio.sleep(0.02)


@dataclass
class PaintedBackend:
    """Paints instead of denoising; counts what it is asked for."""

    objects: ObjectStore
    annotated: list[AnnotationTask] = field(default_factory=list)
    generated: list[tuple[GenerationTask, bool, bool, int]] = field(default_factory=list)
    """Task, whether an init image and a mask came with it, number of control maps."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: ``generate`` waits."""
    failure: ServeError | None = None
    replicas: int = 1
    missing: dict[str, str] = field(default_factory=dict)
    """Annotators that lack something."""
    silent: bool = False
    """No annotator replica answers."""

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def touched(self) -> int:
        return len(self.annotated) + len(self.generated)

    async def annotate(
        self,
        task: AnnotationTask,
        image: ImageArray,
        mask: ImageArray | None = None,
        output: MapOutput | None = None,
    ) -> Annotation:
        assert image.ndim == 3
        assert (mask is not None) == (task.control_type == "inpaint")
        self.annotated.append(task)
        if self.failure is not None:
            raise self.failure
        info = AnnotationInfo(
            control_type=task.control_type, annotator=task.annotator or task.control_type, params=task.params
        )
        if output is not None:
            self._store(output.key, picture(task.width, task.height, len(self.annotated)), output.base64_text)
        return Annotation(info, np.zeros((task.height, task.width, 3), np.uint8))

    async def generate(
        self,
        ref: AttemptRef,
        task: GenerationTask,
        output: OutputOptions,
        init_image: ImageArray | None = None,
        mask: ImageArray | None = None,
        maps: Sequence[Annotation] = (),
    ) -> GenerationResult:
        self.generated.append((task, init_image is not None, mask is not None, len(maps)))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        keys = []
        for index, seed in enumerate(task.seeds):
            keys.append(f"{ref.name}/{output.file_name(index)}")
            self._store(keys[-1], picture(task.width, task.height, seed % 256), output.base64_text)
        return GenerationResult(
            keys=tuple(keys), model_hash="m", net_hashes=("n",), unet_forwards=1, mean_rows=2, queue_s=0, run_s=0.01
        )

    def _store(self, key: str, data: bytes, base64_text: bool) -> None:
        if base64_text:
            self.objects.put(key, base64.b64encode(data), "text/plain; charset=us-ascii")
        else:
            self.objects.put(key, data, "image/png")

    async def cancel(self, ref: AttemptRef) -> None:
        raise NotImplementedError(f"no test cancels a running attempt: {ref}")

    async def progress(self, refs: Collection[AttemptRef]) -> Mapping[AttemptRef, float]:
        return dict.fromkeys(refs, 0.25)

    async def stats(self) -> BackendStats:
        denoiser = DenoiserStats(
            replica="d1",
            node="node-a",
            pid=1,
            device="cuda:0",
            families=(),
            running=0,
            waiting=0,
            max_rows=16,
            deterministic=False,
            unet_forwards=0,
            unet_rows=0,
            generate_calls=len(self.generated),
        )
        annotator = AnnotatorStats(
            replica="a1", node="node-b", pid=2, annotate_calls=len(self.annotated), missing=self.missing
        )
        return BackendStats(denoisers=(denoiser,) * self.replicas, annotators=() if self.silent else (annotator,))

    async def capacity(self) -> int:
        return 8


@dataclass
class Server:
    """One gateway and one dispatcher, as a client and as an operator see them."""

    app: FastAPI
    resources: Resources
    backend: PaintedBackend
    http: httpx2.AsyncClient

    async def post(self, path: str, body: object, **headers: str) -> dict[str, Any]:
        """Post JSON; the status is 200 whatever happens."""
        # Not the client's own JSON: it refuses the unpaired surrogates that clients send.
        response = await self.http.post(f"{API}/{path}", content=json.dumps(body), headers=headers)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def started(self) -> None:
        """Waits until a job has reached the denoisers."""

        async def generating() -> bool:
            return bool(self.backend.generated)

        await until(generating)

    async def status(self, job_id: int, status: str) -> dict[str, Any]:
        """Waits until ``fetch`` says ``status``; returns the answer."""
        answer: dict[str, Any] = {}

        async def reached() -> bool:
            answer.update(await self.post("fetch", {"key": KEY, "request_id": job_id}))
            return bool(answer["status"] == status)

        await until(reached)
        return answer

    async def file(self, url: str, status_code: int) -> None:
        """Waits until a public URL answers with ``status_code``."""

        async def reached() -> bool:
            return (await self.get(url)).status_code == status_code

        await until(reached)

    async def get(self, url: str, **headers: str) -> httpx2.Response:
        """Get one of our public URLs."""
        return await self.http.get(url.removeprefix(PUBLIC_URL), headers=headers)


def _entry(model_id: str, kind: ModelType, family: str, control_type: str | None = None) -> ModelEntry:
    return ModelEntry(
        id=model_id,
        type=kind,
        family=family,
        control_type=control_type,
        location=f"/nowhere/{model_id}",
        hash=model_id.ljust(64, "0"),
        size_bytes=1,
    )


def publish(catalog: Catalog) -> None:
    for entry in (
        _entry("tiny", ModelType.BASE, "sd15"),
        _entry("other", ModelType.BASE, "sdxl"),
        *(_entry(f"net-{name}", ModelType.CONTROLNET, "sd15", name) for name in ("canny", "tile", "inpaint", "depth")),
        _entry("mine", ModelType.CONTROLNET, "sd15"),
        _entry("xl-canny", ModelType.CONTROLNET, "sdxl", "canny"),
    ):
        catalog.add(entry)


@asynccontextmanager
async def serving(folder: Path, sections: Mapping[str, object]) -> AsyncIterator[Server]:
    """A gateway and a dispatcher on a data folder; ``sections`` replace sections of the configuration."""
    config = AppConfig.model_validate({"data": folder, **sections})
    resources = await asyncio.to_thread(open_resources, config)
    backend = PaintedBackend(resources.objects)
    async with GuardedClient(config.fetch) as client:
        dispatcher = Dispatcher(
            config, resources.jobs, resources.objects, backend, client, PrometheusMeter(), "dispatcher-1"
        )

        async def nudge() -> None:
            dispatcher.nudge()

        services = Services(
            config=config,
            jobs=resources.jobs,
            waiter=JobWaiter(resources.jobs, tick_s=0.01),
            keys=resources.keys,
            catalog=resources.catalog,
            objects=resources.objects,
            backend_stats=backend.stats,
            nudge=nudge,
        )
        app = build_application(services)
        running = asyncio.create_task(dispatcher.run())
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=PUBLIC_URL) as http:
            yield Server(app, resources, backend, http)
        backend.gate.set()
        await dispatcher.stop(5)
        await running
    resources.database.close()
