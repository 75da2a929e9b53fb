"""``GET /livez`` and ``GET /readyz``: for load balancers and orchestrators; real status codes, no key."""

import asyncio
import logging
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


class Health(BaseModel):
    status: str
    """``ok`` or ``unavailable``."""
    problems: list[str] = []
    """Why no picture can be drawn now."""


def health_routes(services: Services) -> Iterator[APIRoute]:
    async def livez(_request: Request) -> Response:
        """The process is up."""
        return _report([])

    async def readyz(_request: Request) -> Response:
        """A request that comes now can be served."""
        return _report(await _problems(services))

    yield APIRoute("/livez", livez, response_model=None, responses={200: {"model": Health}})
    not_ready = {"model": Health, "description": "Not able to take requests"}
    yield APIRoute("/readyz", readyz, response_model=None, responses={200: {"model": Health}, 503: not_ready})


def _report(problems: list[str]) -> Response:
    health = Health(status="unavailable" if problems else "ok", problems=problems)
    return AsciiJSONResponse(health.model_dump(), 503 if problems else 200, {"Cache-Control": "no-store"})


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
