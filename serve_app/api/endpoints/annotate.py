"""``POST annotate``: the control maps of a picture, and nothing drawn. A job like any other, without a GPU."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, JsonValue

from serve_app.api.endpoints.acceptance import accept
from serve_app.api.endpoints.generation import OUT_FOLDER, Pictures, Size, storable_webhook, take_pictures, yes_no
from serve_app.api.endpoints.hints import AnnotatorNames, AnnotatorParams, check_ready, choose_annotators
from serve_app.api.envelopes import Answer
from serve_app.api.fields import Flag, Ignored, Names, Picture, Problems, TrackId, Whole, WireModel, parse
from serve_app.api.operations import Call
from serve_app.config import AppConfig, LimitsConfig
from serve_app.controls import CONTROL_TYPES, control_type_problem
from serve_app.images import MIN_SIDE
from serve_app.jobs.job import JobSpec
from serve_app.tasks import MapInput, MapsTask, OutputOptions


class AnnotateRequest(WireModel):
    """Body of ``POST annotate``. The body of a ``POST controlnet`` for built-in ids is one too."""

    model_config = ConfigDict(json_schema_extra={"required": ["key", "init_image", "controlnet_type"]})
    verbatim = frozenset({"track_id"})

    key: Ignored = None
    """Your API key; or send it as ``Authorization: Bearer``."""
    init_image: Picture = ""
    """Link, base64 or data URI."""
    image: Picture = ""
    """Another name of ``init_image``."""
    mask_image: Picture = ""
    """For the control type inpaint."""
    controlnet_type: Names = ()
    """One control type or a list: one map each."""
    controlnet_model: Names = ()
    """Taken for ``controlnet_type`` where that is not given."""
    annotator: AnnotatorNames = ()
    """What makes the maps: one name per control type, or one for all; ``GET annotators`` lists them."""
    annotator_params: AnnotatorParams = ()
    """The annotator's parameters by name: one object for all, of which each annotator takes what it knows, or a list
    with one per control type, null for the defaults. ``{"canny": {...}}`` in it holds for that type alone."""
    width: Size | None = None
    """Pixels, a multiple of 8. Default: the picture's own width within the limits, or as the height says."""
    height: Size | None = None
    base64: Flag = False
    """yes: every URL of the output serves base64 text."""
    temp: Flag = False
    """yes: the files are deleted after 24 hours."""
    instant_response: Flag = False
    """yes: answer ``processing`` at once."""
    webhook: Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)] = None
    """URL that gets one POST when the job has ended. A bad one never refuses a job."""
    track_id: TrackId = None
    """Any scalar, echoed unchanged."""

    @property
    def picture(self) -> str:
        return self.init_image or self.image

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.controlnet_type or self.controlnet_model


async def annotate(call: Call) -> Answer:
    """Make the control maps of a picture, to look at them or to send them with ``auto_hint: no``.

    The output has one map per control type, in order. Waits and answers as ``POST controlnet`` does.
    """
    services = call.services
    wish, problems = parse(AnnotateRequest, call.fields)
    maps = _check(wish, services.config.limits, problems)
    remedy = "Or choose another annotator of this control type: GET annotators says which are ready."
    await check_ready(maps, services, problems, remedy)
    file_prefix = str(uuid.uuid4())
    sources = {"init_image": wish.picture, "mask_image": wish.mask_image}
    given = {field: text for field, text in sources.items() if text}
    pictures = await take_pictures(given, services, file_prefix, problems)
    problems.raise_if_any()
    spec = _job_spec(wish, services.config, maps, pictures, file_prefix)
    return await accept(call, spec, pictures.inline, instant=wish.instant_response)


def _check(wish: AnnotateRequest, limits: LimitsConfig, problems: Problems) -> tuple[MapInput, ...]:
    for field, value, maximum in (
        ("width", wish.width, limits.max_width),
        ("height", wish.height, limits.max_height),
    ):
        try:
            Whole(MIN_SIDE, maximum, 8).read(value if value is not None else MIN_SIDE)
        except ValueError as error:
            problems.add(field, f"The {field} field {error}.")
    if not wish.picture and "init_image" not in problems and "image" not in problems:
        problems.missing("init_image")
    kinds = wish.kinds
    if not kinds and "controlnet_type" not in problems:
        problems.missing("controlnet_type")
    if len(kinds) > limits.max_controls:
        problems.add(
            "controlnet_type",
            f"The controlnet_type field has {len(kinds)} types; at most {limits.max_controls} are allowed.",
        )
        return ()
    unknown = [problem for kind in kinds if (problem := control_type_problem(kind))]
    for problem in unknown:
        problems.add("controlnet_type", problem)
    if unknown:
        return ()
    if any(CONTROL_TYPES[kind].needs_mask for kind in kinds) and not wish.mask_image and "mask_image" not in problems:
        problems.add("mask_image", "The mask_image field is required with the control type 'inpaint'.")
    return choose_annotators(kinds, wish.annotator, wish.annotator_params, auto_hint=True, problems=problems)


def _job_spec(
    wish: AnnotateRequest, config: AppConfig, maps: Sequence[MapInput], pictures: Pictures, file_prefix: str
) -> JobSpec:
    limits = config.limits
    return JobSpec(
        endpoint="annotate",
        task=MapsTask(
            controls=tuple(maps),
            width=wish.width,
            height=wish.height,
            max_width=limits.max_width,
            max_height=limits.max_height,
        ),
        inputs=pictures.links,
        control_sources=("init_image",) * len(maps),
        output=OutputOptions(file_prefix=file_prefix, base64_text=wish.base64),
        meta=_meta(wish, pictures.echo, file_prefix),
        temp=wish.temp,
        webhook=storable_webhook(wish.webhook, config),
        track_id=wish.track_id,
    )


def _meta(wish: AnnotateRequest, echo: Mapping[str, str], file_prefix: str) -> dict[str, JsonValue]:
    """The request under the names of ``POST controlnet``; a size that follows from the picture is known at the end."""
    return {
        "controlnet_type": ",".join(wish.kinds),
        "W": wish.width,
        "H": wish.height,
        "init_image": echo.get("init_image"),
        "mask_image": echo.get("mask_image"),
        "full_url": "no",
        "outdir": OUT_FOLDER,
        "file_prefix": file_prefix,
        "base64": yes_no(wish.base64),
        "temp": yes_no(wish.temp),
    }
