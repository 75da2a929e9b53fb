"""From a checked request to an answer: accept the job, wait for its row, say what became of it."""

import asyncio
from collections.abc import Mapping

from serve_app.api.envelopes import Answer
from serve_app.api.operations import Call
from serve_app.api.services import Services
from serve_app.jobs.answers import fetch_body, submit_body
from serve_app.jobs.job import Job, JobSpec
from serve_app.jobs.lifecycle import submit
from serve_app.jobs.outlook import Outlook


async def accept(call: Call, spec: JobSpec, inline: Mapping[str, bytes], *, instant: bool) -> Answer:
    """Accept a job and answer for it: ended within the configured time, or ``processing``.

    Only the job's row is awaited, never the work itself: a client that hangs up cancels nothing.

    Raises:
        QueueFull: a queue limit is met.
        WorkerBusy: the inline pictures cannot be stored.
    """
    services = call.services
    job = await submit(services.jobs, services.objects, call.principal, spec, inline)
    await services.nudge()
    wait_s = 0.0 if instant or "respond-async" in call.preferences else services.config.server.sync_wait_s
    if wait_s > 0:
        job = await services.waiter.wait(job.id, wait_s)
    return Answer(submit_body(job, services.config.public_url, await _outlook(services, job)))


async def fetched(services: Services, job: Job) -> Answer:
    """The state of a job as ``fetch`` tells it."""
    return Answer(fetch_body(job, services.config.public_url, await _outlook(services, job)))


async def _outlook(services: Services, job: Job) -> Outlook | None:
    return None if job.status.ended else await asyncio.to_thread(services.jobs.outlook, job.id)
