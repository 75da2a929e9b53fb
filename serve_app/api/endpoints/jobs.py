"""Jobs by their own name: list, look at, cancel. Ours; the vendor's API knows only ``fetch``."""

import asyncio
from typing import Annotated, Literal

from pydantic import BaseModel, JsonValue

from serve_app.api.envelopes import Answer
from serve_app.api.fields import Name, Whole, WireModel, parse, read_integer
from serve_app.api.operations import Call
from serve_app.errors import NotFound
from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.outlook import Outlook

MAX_JOB_ID = 2**53 - 1
MAX_PAGE = 100


class JobState(BaseModel):
    id: int
    state: JobStatus
    endpoint: str
    created_at: float
    """Seconds since the epoch."""
    started_at: float | None
    finished_at: float | None
    queue_position: int
    """From 1; 0 when the job runs or has ended."""
    eta: int | None
    """Estimated seconds to the end; null when it has ended."""
    progress: float
    """0 to 1: the share of the model evaluations that was done a few seconds ago, 1 after success."""
    cancel_requested: bool
    error: str | None


class JobAnswer(BaseModel):
    status: Literal["success"] = "success"
    job: JobState


class JobsAnswer(BaseModel):
    status: Literal["success"] = "success"
    jobs: list[JobState]
    next_cursor: str | None
    """Send it as ``cursor`` for the next page; null on the last one."""


class CancelAnswer(BaseModel):
    status: Literal["success"] = "success"
    message: str
    job: JobState


class JobsQuery(WireModel):
    """Query of ``GET jobs``."""

    limit: Annotated[int, Whole(1, MAX_PAGE)] = 20
    cursor: Name = ""


def read_job_id(value: JsonValue) -> int | None:
    """The id that ``value`` spells, or None when no job can have it."""
    job_id = read_integer(value)
    return job_id if job_id is not None and 0 < job_id <= MAX_JOB_ID else None


async def visible_job(call: Call, job_id: int | None) -> Job:
    """The job, if the caller may see it: a tenant sees its own; a keyless caller proves itself by knowing the id.

    Raises:
        NotFound: no such job, or another tenant's; the two are told apart nowhere.
    """
    job = None if job_id is None else await asyncio.to_thread(call.services.jobs.get, job_id)
    if job is None or (call.caller is not None and job.tenant != call.caller.tenant):
        raise NotFound
    return job


async def job_state(call: Call) -> Answer:
    """Show one of your own jobs."""
    job = await visible_job(call, read_job_id(call.path["request_id"]))
    return Answer(JobAnswer(job=await _state(call, job)).model_dump(mode="json"))


async def jobs_list(call: Call) -> Answer:
    """List your own jobs, newest first."""
    wish, problems = parse(JobsQuery, dict(call.query))
    before = read_job_id(wish.cursor) if wish.cursor else None
    if wish.cursor and before is None:
        problems.add("cursor", "The cursor field must be the next_cursor of a page before.")
    problems.raise_if_any()
    found = await asyncio.to_thread(call.services.jobs.list, call.principal.tenant, wish.limit + 1, before)
    page = found[: wish.limit]
    cursor = str(page[-1].id) if len(found) > len(page) else None
    states = [await _state(call, job) for job in page]
    return Answer(JobsAnswer(jobs=states, next_cursor=cursor).model_dump(mode="json"))


async def cancel_job(call: Call) -> Answer:
    """Cancel one of your own jobs, queued or running."""
    before = await visible_job(call, read_job_id(call.path["request_id"]))
    job = await asyncio.to_thread(call.services.jobs.request_cancel, before.id)
    if job is None:
        raise NotFound
    if before.status.ended:
        message = "The job had already ended."
    elif job.status is JobStatus.CANCELLED:
        message = "The job is cancelled."
    else:
        message = "The job ends at its next step."
    return Answer(CancelAnswer(message=message, job=await _state(call, job)).model_dump(mode="json"))


async def _state(call: Call, job: Job) -> JobState:
    outlook: Outlook | None = None
    if not job.status.ended:
        outlook = await asyncio.to_thread(call.services.jobs.outlook, job.id)
    return JobState(
        id=job.id,
        state=job.status,
        endpoint=job.spec.endpoint,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        queue_position=outlook.position if outlook else 0,
        eta=outlook.eta_s if outlook else None,
        progress=1.0 if job.status is JobStatus.SUCCESS else round(job.progress or 0.0, 3),
        cancel_requested=job.cancel_requested,
        error=job.error,
    )
