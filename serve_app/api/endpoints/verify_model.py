"""``POST verify_model``: is a model there?"""

import asyncio
from typing import Literal

from pydantic import BaseModel, ConfigDict

from serve_app.api.envelopes import Answer
from serve_app.api.fields import Ignored, Name, WireModel, parse
from serve_app.api.operations import Call
from serve_app.errors import NotFound


class VerifyModelRequest(WireModel):
    """Body of ``POST verify_model``."""

    model_config = ConfigDict(json_schema_extra={"required": ["key", "model_id"]})

    key: Ignored = None
    model_id: Name = ""


class VerifyModelAnswer(BaseModel):
    status: Literal["success"] = "success"
    message: str = "Model exists on server"


async def verify_model(call: Call) -> Answer:
    """Say whether a model can be used."""
    wish, problems = parse(VerifyModelRequest, call.fields)
    if not wish.model_id and "model_id" not in problems:
        problems.missing("model_id")
    problems.raise_if_any()
    if await asyncio.to_thread(call.services.catalog.find, wish.model_id) is None:
        raise NotFound("Model not found")
    return Answer(VerifyModelAnswer().model_dump())
