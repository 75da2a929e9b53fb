"""``GET /livez`` and ``GET /readyz``: for load balancers and orchestrators; real status codes, no key."""

import asyncio
import logging
import time
from collections.abc import Iterator

from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from serve_app.api.envelopes import AsciiJSONResponse
from serve_app.api.services import Services
from serve_app.config import DenoiserConfig
from serve_app.database import OUTAGES
from serve_app.jobs.job import JobStatus
from serve_app.models.catalog import ModelType

logger = logging.getLogger(__name__)


KEPT_S = 1.0
"""How long a verdict on readiness holds: anybody may ask, and each look asks the database and every replica."""


class Health(BaseModel):
    status: str
    """``ok`` or ``unavailable``."""
    problems: list[str] = []
    """Why no picture can be drawn now."""


def health_routes(services: Services) -> Iterator[APIRoute]:
    readiness = _Readiness(services)

    async def livez(_request: Request) -> Response:
        """The process is up."""
        return _report([])

    async def readyz(_request: Request) -> Response:
        """A request that comes now can be served."""
        return _report(await readiness.problems())

    yield APIRoute("/livez", livez, response_model=None, responses={200: {"model": Health}})
    not_ready = {"model": Health, "description": "Not able to take requests"}
    yield APIRoute("/readyz", readyz, response_model=None, responses={200: {"model": Health}, 503: not_ready})


def _report(problems: list[str]) -> Response:
    health = Health(status="unavailable" if problems else "ok", problems=problems)
    return AsciiJSONResponse(health.model_dump(), 503 if problems else 200, {"Cache-Control": "no-store"})


class _Readiness:
    """What keeps this process from serving: looked up once per ``KEPT_S``, however many ask at once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._look: asyncio.Task[list[str]] | None = None
        self._kept_until = 0.0

    async def problems(self) -> list[str]:
        if self._look is None or (self._look.done() and time.monotonic() >= self._kept_until):
            self._look = asyncio.create_task(self._fresh(), name="readiness")
        return await asyncio.shield(self._look)  # who hangs up ends the look for nobody else

    async def _fresh(self) -> list[str]:
        problems = await _problems(self._services)
        self._kept_until = time.monotonic() + KEPT_S  # a look that fails is not kept
        return problems


def _from_zero(denoiser: DenoiserConfig) -> bool:
    """Whether a replica is started by the first request only."""
    return denoiser.autoscaling_config is not None and denoiser.autoscaling_config.min_replicas == 0


async def _problems(services: Services) -> list[str]:
    problems = []
    try:
        entries = await asyncio.to_thread(services.catalog.list)
        counts = await asyncio.to_thread(services.jobs.counts)
    except OUTAGES:
        logger.exception("readyz: the database is unavailable")
        return ["the database cannot be reached"]
    if not any(entry.type is ModelType.BASE for entry in entries):
        problems.append("no base model is published")
    if counts[JobStatus.QUEUED] >= services.config.limits.queue_max:
        problems.append("the queue is full")
    stats = await services.backend_stats()
    if not stats.denoisers and not all(map(_from_zero, services.config.denoisers)):
        problems.append("no denoiser answers")
    return problems
