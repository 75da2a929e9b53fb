"""``POST system_details``: how many models, how long the queue, which replicas."""

import asyncio
from typing import Literal

from pydantic import BaseModel

from serve_app.api.endpoints.annotators_list import ready_types
from serve_app.api.envelopes import Answer
from serve_app.api.operations import Call
from serve_app.backend import AnnotatorStats, DenoiserStats
from serve_app.jobs.job import JobStatus


class SystemAnswer(BaseModel):
    status: Literal["ok"] = "ok"
    """Not ``success``: as the hosted API answers."""
    model_count: int
    queue_time: float
    """Seconds that a job submitted now is expected to wait."""
    queued: int
    processing: int
    nodes: list[str]
    gpus: int
    """Denoiser replicas on a GPU."""
    denoisers: list[DenoiserStats]
    annotators: list[AnnotatorStats]
    control_types_ready: list[str] | None
    """Control types whose default annotator lacks nothing on any replica; null: no annotator replica has answered."""


async def system_details(call: Call) -> Answer:
    """Describe the state of the cluster."""
    services = call.services
    models = await asyncio.to_thread(services.catalog.list)
    counts = await asyncio.to_thread(services.jobs.counts)
    queue_time_s = await asyncio.to_thread(services.jobs.queue_time_s)
    stats = await services.backend_stats()
    queued, processing = counts[JobStatus.QUEUED], counts[JobStatus.PROCESSING]
    answer = SystemAnswer(
        model_count=len(models),
        queue_time=round(queue_time_s, 3),
        queued=queued,
        processing=processing,
        nodes=sorted({one.node for one in stats.denoisers} | {one.node for one in stats.annotators}),
        gpus=sum(replica.device.startswith("cuda") for replica in stats.denoisers),
        denoisers=list(stats.denoisers),
        annotators=list(stats.annotators),
        control_types_ready=ready_types(services.annotators.learn(stats)),
    )
    return Answer(answer.model_dump(mode="json"))
