"""``fetch``: the state of a job, and its pictures when it is done."""

from pydantic import ConfigDict

from serve_app.api.endpoints.acceptance import fetched
from serve_app.api.endpoints.jobs import read_job_id, visible_job
from serve_app.api.envelopes import Answer
from serve_app.api.fields import Ignored, WireModel
from serve_app.api.operations import Call
from serve_app.errors import NotFound
from serve_app.jobs.answers import not_found_body


class FetchRequest(WireModel):
    """Body of ``POST fetch``."""

    model_config = ConfigDict(json_schema_extra={"required": ["key", "request_id"]})

    key: Ignored = None
    request_id: str = ""
    """``id`` of the answer to the submit."""


async def fetch(call: Call) -> Answer:
    """Ask for the state of a job: ``processing``, ``success`` with its pictures, or ``failed``.

    Also ``GET`` without a key: the id cannot be guessed. A key that is sent must belong to the job's owner.
    """
    try:
        job = await visible_job(call, read_job_id(call.path.get("request_id", call.fields.get("request_id"))))
    except NotFound as error:
        return Answer(not_found_body(), error.status)
    return await fetched(call.services, job)
