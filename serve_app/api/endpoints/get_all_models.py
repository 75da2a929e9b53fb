"""``POST get_all_models``: the catalogue, base models first."""

import asyncio
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from serve_app.api.envelopes import Answer
from serve_app.api.operations import Call
from serve_app.models.catalog import ModelEntry


class ListedModel(BaseModel):
    load_data: str
    """When the model was published, ``MM/DD/YYYY HH:MM:SS`` UTC; the vendor's spelling of the key."""
    model_id: str
    type: str
    """base, controlnet, lora, vae or embedding."""
    family: str
    """A ControlNet works with base models of its own family only."""
    hash: str
    control_type: str | None
    """For a ControlNet: the built-in id it answers to; ``union`` for one that knows many types."""
    control_types: list[str]
    """For a ControlNet: every control type it can stand for by its built-in id."""


class ModelsAnswer(BaseModel):
    status: Literal["success"] = "success"
    models: list[ListedModel]


def _listed(entry: ModelEntry) -> ListedModel:
    return ListedModel(
        load_data=datetime.fromtimestamp(entry.created_at, UTC).strftime("%m/%d/%Y %H:%M:%S"),
        model_id=entry.id,
        type=entry.type.value,
        family=entry.family,
        hash=entry.hash,
        control_type=entry.control_type,
        control_types=list(entry.control_types),
    )


async def get_all_models(call: Call) -> Answer:
    """List every model that can be used."""
    entries = await asyncio.to_thread(call.services.catalog.list)
    return Answer(ModelsAnswer(models=[_listed(entry) for entry in entries]).model_dump())
