"""Dispatcher replicas: drive the jobs in the database through the annotators and denoisers."""

import asyncio

from ray.serve.handle import DeploymentHandle

from deployments.handles import RayBackend
from deployments.observability import RayMeter
from deployments.process import replica_name
from serve_app.config import AppConfig


class Dispatcher:
    def __init__(self, config: AppConfig, annotator: DeploymentHandle, denoisers: dict[str, DeploymentHandle]) -> None:
        from serve_app.fetching import GuardedClient
        from serve_app.jobs.dispatcher import Dispatcher as JobDispatcher
        from serve_app.resources import open_resources

        resources = open_resources(config)
        self._client = GuardedClient(config.fetch)
        self._dispatcher = JobDispatcher(
            config,
            resources.jobs,
            resources.objects,
            RayBackend(config, annotator, denoisers),
            self._client,
            RayMeter(),
            replica_name(),
        )
        # A task of its own, outside every request: whoever cancels a request must not cancel a job.
        self._loop = asyncio.get_running_loop().create_task(self._dispatcher.run())
        self._drain_s = config.dispatcher.graceful_shutdown_timeout_s / 2

    async def nudge(self) -> None:
        """There is new work."""
        self._dispatcher.nudge()

    async def check_health(self) -> None:
        if self._loop.done():
            raise RuntimeError("the dispatcher's loop has ended")

    async def __del__(self) -> None:
        await self._dispatcher.stop(self._drain_s)
        await self._client.aclose()
