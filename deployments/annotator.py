"""Annotator replicas: photo in, control map out. CPU work in a thread; the map stays in the object store."""

import asyncio

import ray

from deployments.observability import RayMeter
from deployments.process import node_name, pid, replica_name
from serve_app.backend import AnnotatorStats
from serve_app.config import AnnotatorConfig
from serve_app.tasks import AnnotationInfo, AnnotationTask, ImageArray


class Annotator:
    def __init__(self, config: AnnotatorConfig) -> None:
        import cv2

        from serve_app.annotators import annotate

        cv2.setNumThreads(config.threads)
        self._annotate = annotate
        self._calls = 0
        self._meter = RayMeter()

    async def annotate(
        self, task: AnnotationTask, image: ImageArray, mask: ImageArray | None
    ) -> tuple[AnnotationInfo, list[ray.ObjectRef]]:
        """The map's reference comes in a list: a bare reference would be resolved and sent along."""
        self._calls += 1
        control_map, info = await asyncio.to_thread(self._annotate, task, image, mask)
        self._meter.count("annotations", control_type=task.control_type)
        return info, [ray.put(control_map)]

    async def stats(self) -> AnnotatorStats:
        return AnnotatorStats(replica=replica_name(), node=node_name(), pid=pid(), annotate_calls=self._calls)
