"""Webhooks: told once, signed, left unsent, in trouble."""

import json

import sqlalchemy as sa

from serve_app.database import Database, jobs
from serve_app.errors import JobError
from serve_app.jobs.job import JobSpec, JobStatus
from serve_app.jobs.store import JobStore
from serve_app.webhooks import secret_bytes, signature
from support.backend import ScriptedBackend
from support.dispatch import SECRET, Start, end_of, now, until
from support.jobs import ALICE, make_spec
from support.web import WebServer


def hooked(web: WebServer) -> JobSpec:
    return make_spec(webhook=f"{web.url}/hook")


async def test_a_webhook_tells_the_end_once_and_signed(start: Start, store: JobStore, web: WebServer) -> None:
    async with start():
        job = store.submit(ALICE, hooked(web))
        await end_of(store, job)
        await until(lambda: now(store, job).webhook_status == "delivered")
    ((line, headers, body),) = web.requests
    assert line.startswith("POST /hook ")
    assert headers["webhook-id"] == f"msg_{job.id}"
    timestamp = int(headers["webhook-timestamp"])
    assert headers["webhook-signature"] == signature(secret_bytes(SECRET), f"msg_{job.id}", timestamp, body)
    told = json.loads(body)
    assert (told["status"], told["id"], told["track_id"]) == ("success", job.id, "order-1")


async def test_a_failure_is_told_too(start: Start, store: JobStore, web: WebServer, backend: ScriptedBackend) -> None:
    backend.script = [JobError("impossible")]
    async with start():
        job = store.submit(ALICE, hooked(web))
        await until(lambda: bool(web.requests))
    told = json.loads(web.requests[0][2])
    assert told == {"status": "failed", "id": job.id, "message": "impossible", "track_id": "order-1"}


async def test_a_webhook_that_nobody_sent_is_sent_by_the_sweep(
    start: Start, store: JobStore, database: Database, web: WebServer
) -> None:
    """Its dispatcher died after the end of the job, or the job was cancelled while it waited."""
    job = store.submit(ALICE, hooked(web))
    store.request_cancel(job.id)
    with database.transaction() as connection:
        connection.execute(sa.update(jobs).values(finished_at=jobs.c.finished_at - 120))
    async with start():
        await until(lambda: now(store, job).webhook_status == "delivered")
    assert [json.loads(body)["message"] for _, _, body in web.requests] == ["The job was cancelled."]


async def test_a_webhook_of_a_job_nobody_can_read_is_recorded_as_failed(
    start: Start, store: JobStore, database: Database, web: WebServer
) -> None:
    job = store.submit(ALICE, hooked(web))
    store.request_cancel(job.id)
    with database.transaction() as connection:
        connection.execute(sa.update(jobs).values(finished_at=jobs.c.finished_at - 120, spec="{}"))
    async with start():
        await until(lambda: (now(store, job).webhook_status or "").startswith("failed"))
    assert web.requests == []


async def test_a_webhook_in_trouble_neither_delays_nor_fails_the_job(
    start: Start, store: JobStore, web: WebServer
) -> None:
    web.status, web.delay_s = 500, 0.5
    async with start():
        job, refused = store.submit(ALICE, hooked(web)), store.submit(ALICE, make_spec(webhook="http://10.0.0.1/"))
        for waiting in (job, refused):
            ended = await end_of(store, waiting)
            assert ended.status is JobStatus.SUCCESS
        assert now(store, job).webhook_status == "pending"
        await until(lambda: now(store, job).webhook_status == "failed: HTTP 500")
        await until(lambda: now(store, refused).webhook_status == "failed: the address could not be reached")
