"""The wire bodies, key by key."""

import pytest

from serve_app.jobs.answers import fetch_body, not_found_body, submit_body, webhook_body
from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.outlook import Outlook
from serve_app.tasks import AnnotationInfo
from support.jobs import RESULT, make_spec

URL = "https://pictures.example"
OUTLOOK = Outlook(position=3, eta_s=12)


def job(status: JobStatus, error: str | None = None) -> Job:
    info = AnnotationInfo(control_type="canny", annotator="canny", params={"low": 100})
    return Job(
        id=2**52 + 1,
        tenant="alice",
        key_id="k",
        status=status,
        spec=make_spec(samples=2, webhook="https://h/w"),
        created_at=1.0,
        result=RESULT.model_copy(update={"annotators": (info,), "net_hashes": ("n",)})
        if status is JobStatus.SUCCESS
        else None,
        error=error,
        webhook_status="pending",
    )


def test_success() -> None:
    done = job(JobStatus.SUCCESS)
    urls = [f"{URL}/generations/{done.spec.output.file_prefix}-{n}.png" for n in range(2)]
    body = submit_body(done, URL, None)
    assert body == {
        "status": "success",
        "generationTime": 0.5,
        "id": 2**52 + 1,
        "output": urls,
        "proxy_links": urls,
        "image_links": urls,
        "nsfw_content_detected": None,
        "webhook_status": "pending",
        "track_id": "order-1",
        "meta": {
            "prompt": "a house",
            "seed": 7,
            "safetychecker": "no",
            "seeds": [7, 8],
            "annotators": [{"control_type": "canny", "annotator": "canny", "params": {"low": 100}, "empty": False}],
            "model_hash": "hash",
            "controlnet_hashes": ["n"],
        },
    }
    assert fetch_body(done, URL, None) == body
    assert webhook_body(done, URL) == body


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.PROCESSING])
def test_processing(status: JobStatus) -> None:
    running = job(status)
    body = submit_body(running, URL, OUTLOOK)
    assert set(body) == {
        "status", "tip", "eta", "message", "messege", "fetch_result", "id", "output", "meta", "future_links"
    }  # fmt: skip
    assert body["status"] == "processing"
    assert body["eta"] == 12
    assert body["message"] == body["messege"]
    assert body["fetch_result"] == f"{URL}/api/v1/enterprise/fetch/{2**52 + 1}"
    assert body["output"] == []
    prefix = running.spec.output.file_prefix
    assert body["future_links"] == [f"{URL}/generations/{prefix}-{n}.png" for n in range(2)]
    polled = fetch_body(running, URL, OUTLOOK)
    assert (polled["status"], polled["output"], polled["eta"], polled["queue_position"]) == ("processing", "", 12, 3)
    assert polled["message"] == polled["messege"]


@pytest.mark.parametrize(
    ("ended", "message"),
    [(job(JobStatus.FAILED, "no such thing"), "no such thing"), (job(JobStatus.CANCELLED), "The job was cancelled.")],
)
def test_failed(ended: Job, message: str) -> None:
    expected = {"status": "failed", "id": ended.id, "message": message, "messege": message, "output": ""}
    assert submit_body(ended, URL, None) == expected
    assert fetch_body(ended, URL, None) == expected
    told = {"status": "failed", "id": ended.id, "message": message, "track_id": "order-1"}
    assert webhook_body(ended, URL) == told


def test_an_unknown_id() -> None:
    assert not_found_body() == {
        "status": "failed",
        "id": "",
        "message": "Request not found",
        "messege": "Request not found",
        "output": "",
    }


def test_a_running_job_needs_an_outlook() -> None:
    with pytest.raises(ValueError, match="outlook"):
        fetch_body(job(JobStatus.QUEUED), URL, None)
