"""Rows of the jobs table as records, also those that another version of the program wrote."""

from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError

from serve_app.jobs.job import Job, JobResult, JobSpec, JobStatus
from serve_app.tasks import GenerationTask, OutputOptions

UNREADABLE: Final = "The job was written by another version of the server and cannot be read by this one."

_NO_TASK = GenerationTask(model="", family="", width=8, height=8, seed=0, scheduler="", steps=1)


def is_readable(row: sa.Row[Any]) -> bool:
    try:
        _read(row)
    except ValidationError:
        return False
    return True


def read_job(row: sa.Row[Any]) -> Job:
    """The record of a row.

    One that cannot be read stands for itself with an empty spec; if it has ended, it counts as failed. So one such
    row stops no statement on many.
    """
    try:
        return _read(row)
    except ValidationError:
        ended = JobStatus(row.status).ended
        found: dict[str, Any] = {
            "spec": JobSpec(endpoint="", task=_NO_TASK, output=OutputOptions(file_prefix=row.file_prefix), meta={}),
            "result": None,
        }
        if ended and row.status != JobStatus.CANCELLED:
            found |= {"status": JobStatus.FAILED, "error": UNREADABLE}
        return Job.model_validate(_columns(row) | found)


def _read(row: sa.Row[Any]) -> Job:
    found = {
        "spec": JobSpec.model_validate_json(row.spec),
        "result": JobResult.model_validate_json(row.result) if row.result is not None else None,
    }
    return Job.model_validate(_columns(row) | found)


def _columns(row: sa.Row[Any]) -> dict[str, Any]:
    fields = row._asdict()
    return {name: fields[name] for name in Job.model_fields if name in fields}
