"""The HTTP ingress: the FastAPI application of ``serve_app.api`` on this replica's resources."""

import asyncio
import logging
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.handles import RayBackend
from deployments.process import replica_name
from serve_app.config import AppConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)


@serve.ingress()
class Gateway:
    def __init__(
        self,
        config: AppConfig,
        dispatcher: DeploymentHandle,
        registry: DeploymentHandle,
        annotator: DeploymentHandle,
        denoisers: dict[str, DeploymentHandle],
    ) -> None:
        from serve_app.resources import open_resources

        # The registry is no one's callee yet; binding it here makes it part of the application.
        del registry
        self._resources = open_resources(config)
        self._dispatcher = dispatcher
        self._backend = RayBackend(config, annotator, denoisers)
        self._nudges: set[asyncio.Task[None]] = set()

    def __serve_build_asgi_app__(self) -> "FastAPI":
        from serve_app.api.application import build_application
        from serve_app.api.services import Services
        from serve_app.jobs.lifecycle import JobWaiter

        resources = self._resources
        return build_application(
            Services(
                config=resources.config,
                jobs=resources.jobs,
                waiter=JobWaiter(resources.jobs),
                keys=resources.keys,
                catalog=resources.catalog,
                objects=resources.objects,
                backend_stats=self._backend.stats,
                nudge=self._nudge,
            )
        )

    async def _nudge(self) -> None:
        # Not awaited by the request: its client may hang up, and dispatchers look for work by themselves anyway.
        task = asyncio.get_running_loop().create_task(self._send_nudge())
        self._nudges.add(task)
        task.add_done_callback(self._nudges.discard)

    async def _send_nudge(self) -> None:
        try:
            await self._dispatcher.broadcast("nudge").results_async(timeout_s=2, return_exceptions=True)
        except Exception:  # whatever went wrong, the dispatcher's own poll finds the job
            logger.info("%s could not nudge the dispatchers", replica_name(), exc_info=True)
