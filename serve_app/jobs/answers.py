"""The wire body of a job in each of its states: what a submit, a fetch and a webhook say. Pure functions."""

from pydantic import JsonValue

from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.outlook import Outlook
from serve_app.tasks import GenerationTask

Body = dict[str, JsonValue]

FETCH_PATH = "/api/v1/enterprise/fetch"
OUTPUT_PATH = "/generations"

_PROCESSING_TIP = "Poll fetch_result with your key, or wait for the webhook, to get the pictures."
_PROCESSING = "Your request is being processed. Fetch the result when the estimated time is over."
_CANCELLED = "The job was cancelled."


def output_urls(job: Job, public_url: str) -> list[JsonValue]:
    """The final URLs of what a job makes, fixed at acceptance."""
    return [f"{public_url}{OUTPUT_PATH}/{name}" for name in job.spec.output_names]


def map_urls(job: Job, public_url: str) -> list[JsonValue]:
    """The final URLs of the control maps that are kept beside a job's pictures."""
    return [f"{public_url}{OUTPUT_PATH}/{name}" for name in job.spec.map_names]


def submit_body(job: Job, public_url: str, outlook: Outlook | None) -> Body:
    """The answer to a submit. ``outlook`` is needed while the job has not ended."""
    return _ended_body(job, public_url) or _processing_body(job, public_url, _needed(outlook))


def fetch_body(job: Job, public_url: str, outlook: Outlook | None) -> Body:
    """The answer to a fetch. ``outlook`` is needed while the job has not ended."""
    return _ended_body(job, public_url) or _pending_body(job, _needed(outlook))


def webhook_body(job: Job, public_url: str) -> Body:
    """What the one POST about an ended job says."""
    if job.status is JobStatus.SUCCESS:
        return _success_body(job, public_url)
    return {"status": "failed", "id": job.id, "message": _reason(job), "track_id": job.spec.track_id}


def not_found_body() -> Body:
    """The answer to a fetch of an unknown id, or of another tenant's."""
    message = "Request not found"
    return {"status": "failed", "id": "", "message": message, "messege": message, "output": ""}


def meta(job: Job) -> Body:
    """The echo of the request, with what is known after the run."""
    echo: Body = {**job.spec.meta}
    task = job.spec.task
    if isinstance(task, GenerationTask):
        # No safety model is served, whatever was asked for.
        echo |= {"safetychecker": "no", "seeds": list(task.seeds)}
    if job.result is not None:
        echo["annotators"] = [info.model_dump(mode="json") for info in job.result.annotators]
        if job.result.size is not None:
            echo["W"], echo["H"] = job.result.size
        if isinstance(task, GenerationTask):
            echo["model_hash"] = job.result.model_hash
            echo["controlnet_hashes"] = list(job.result.net_hashes)
    return echo


def _ended_body(job: Job, public_url: str) -> Body | None:
    if not job.status.ended:
        return None
    return _success_body(job, public_url) if job.status is JobStatus.SUCCESS else _failed_body(job)


def _success_body(job: Job, public_url: str) -> Body:
    urls = output_urls(job, public_url)
    maps: Body = {"control_maps": map_urls(job, public_url)} if job.spec.map_names else {}
    return {
        "status": "success",
        "generationTime": round(job.result.run_s, 3) if job.result else 0.0,
        "id": job.id,
        "output": urls,
        "proxy_links": urls,
        "image_links": urls,
        **maps,
        "nsfw_content_detected": None,
        "webhook_status": job.webhook_status,
        "track_id": job.spec.track_id,
        "meta": meta(job),
    }


def _failed_body(job: Job) -> Body:
    reason = _reason(job)
    return {"status": "failed", "id": job.id, "message": reason, "messege": reason, "output": ""}


def _processing_body(job: Job, public_url: str, outlook: Outlook) -> Body:
    maps: Body = {"future_control_maps": map_urls(job, public_url)} if job.spec.map_names else {}
    return {
        "status": "processing",
        "tip": _PROCESSING_TIP,
        "eta": outlook.eta_s,
        "message": _PROCESSING,
        "messege": _PROCESSING,
        "fetch_result": f"{public_url}{FETCH_PATH}/{job.id}",
        "id": job.id,
        "output": [],
        "meta": meta(job),
        "future_links": output_urls(job, public_url),
        **maps,
    }


def _pending_body(job: Job, outlook: Outlook) -> Body:
    return {
        "status": "processing",
        "message": _PROCESSING,
        "messege": _PROCESSING,
        "output": "",
        "id": job.id,
        "eta": outlook.eta_s,
        "queue_position": outlook.position,
        "progress": round(job.progress or 0.0, 3),
    }


def _reason(job: Job) -> str:
    if job.status is JobStatus.CANCELLED:
        return _CANCELLED
    return job.error or "The job failed."


def _needed(outlook: Outlook | None) -> Outlook:
    if outlook is None:
        raise ValueError("a job that has not ended needs its outlook")
    return outlook
