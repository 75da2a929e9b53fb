"""``POST schedulers_list``: the noise schedulers that can be asked for."""

from pydantic import BaseModel

from serve_app.api.envelopes import Answer
from serve_app.api.operations import Call
from serve_app.schedulers import available_schedulers


class SchedulersAnswer(BaseModel):
    """Names for the ``scheduler`` field. Has no status, as ever."""

    schedulers: list[str]


async def schedulers_list(_call: Call) -> Answer:
    """List the schedulers."""
    return Answer(SchedulersAnswer(schedulers=list(available_schedulers())).model_dump())
