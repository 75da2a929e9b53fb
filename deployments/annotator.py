"""Annotator replicas: photo in, control map out. The map stays in Ray's object store."""

import asyncio

import ray

from deployments.observability import RayMeter
from deployments.process import node_name, on_its_device, replica_name
from serve_app.backend import AnnotatorStats
from serve_app.config import AppConfig
from serve_app.tasks import AnnotationInfo, AnnotationTask, ImageArray, MapOutput


class Annotator:
    def __init__(self, config: AppConfig) -> None:
        import cv2

        from serve_app.annotators.service import open_annotators
        from serve_app.resources import open_resources

        # torch, imported with the first detector that needs it, takes its threads from this process's environment.
        cv2.setNumThreads(config.annotator.threads)
        resources = open_resources(config)
        placed = config.model_copy(update={"annotator": on_its_device(config.annotator)})
        self._service = open_annotators(placed, resources.database, resources.objects, RayMeter())

    async def annotate(
        self, task: AnnotationTask, image: ImageArray, mask: ImageArray | None, output: MapOutput | None
    ) -> tuple[AnnotationInfo, list[ray.ObjectRef]]:
        """The map's reference comes in a list: a bare reference would be resolved and sent along."""
        control_map, info = await self._service.annotate(task, image, mask, output)
        return info, [ray.put(control_map)]

    async def check_health(self) -> None:
        """Serve asks for it first when the replica has started: old maps go though nobody asks for new ones."""
        self._service.start()

    async def stats(self) -> AnnotatorStats:
        return await asyncio.to_thread(self._service.stats, replica_name(), node_name())

    async def __del__(self) -> None:
        await self._service.close()
