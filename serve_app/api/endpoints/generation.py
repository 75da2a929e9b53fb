"""What all endpoints that draw pictures share: their common fields, the checks on them, and the way into the queue.

An endpoint parses its request, runs these checks and its own into one ``Problems``, builds a ``JobSpec`` and hands it
to ``accept``. Nothing here touches a GPU.
"""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, JsonValue

from serve_app.api.fields import (
    Flag,
    Ignored,
    Name,
    Names,
    Problems,
    Real,
    Text,
    TrackId,
    Whole,
    WireModel,
    one_of_words,
    read_flag,
    read_integer,
    show,
)
from serve_app.api.services import Services
from serve_app.config import AppConfig
from serve_app.errors import BodyTooLarge, ImageRejected, UnknownModel, one_of
from serve_app.fetching import url_problem
from serve_app.images import classify, decode_base64, decode_image, decode_mask
from serve_app.jobs.job import InputRef
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.schedulers import ALGORITHM_TYPES, DEFAULT_SCHEDULER, SCHEDULERS, scheduler_problem

MAX_BASE64_PER_BYTE = 1.4
"""Characters: four for three bytes, and line breaks."""
MAX_PROMPT_BYTES = 10_000
"""In UTF-8. A prompt of any length in tokens is encoded, in pieces of 75; a token takes one byte at least, so that this
bounds them at 134 pieces, whatever the script."""
MAX_SEED = 2**32 - 1
OUT_FOLDER = "out"
"""What ``meta.outdir`` has always said."""


def _integer(value: JsonValue) -> int:
    number = read_integer(value)
    if number is None:
        raise ValueError(f"must be a whole number, got {show(value)}")
    return number


Size = Annotated[int, BeforeValidator(_integer)]
"""Pixels; the bounds are the base family's, by configuration, and checked by ``find_base``."""


def _upscale(value: JsonValue) -> int:
    """1 where no upscaling is wanted; yes is x2."""
    factor = None if isinstance(value, bool) else read_integer(value)
    if factor is None:
        return 2 if read_flag(value) else 1
    return Whole(0, 4).read(value) or 1


class GenerationRequest(WireModel):
    """Fields that every endpoint that draws pictures knows."""

    verbatim = frozenset({"track_id"})

    key: Ignored = None
    """Your API key; or send it as ``Authorization: Bearer``."""
    model_id: Name = ""
    """Base model; ``get_all_models`` lists them."""
    prompt: Text = ""
    """``(words:1.2)`` gives words more weight, from 0 to 5; a backslash before a bracket makes it text."""
    negative_prompt: Text = ""
    width: Size = 512
    """Pixels, a multiple of 8."""
    height: Size = 512
    """Pixels, a multiple of 8."""
    samples: Annotated[int, Whole(1, 4)] = 1
    """Pictures; picture k is drawn with seed + k."""
    num_inference_steps: Annotated[int, Whole(1, 50)] = 21
    guidance_scale: Annotated[float, Real(1, 20)] = 7.5
    seed: Annotated[int, Whole(0, MAX_SEED)] | None = None
    """null: a random one, echoed in meta."""
    scheduler: Name = DEFAULT_SCHEDULER
    use_karras_sigmas: Flag = True
    """No effect where the scheduler has none."""
    algorithm_type: Annotated[str, one_of_words(*ALGORITHM_TYPES)] = "none"
    """For DPMSolverMultistepScheduler and DPMSolverSinglestepScheduler; no effect on others."""
    tomesd: Flag | None = None
    """Accepted; token merging is not done here, and meta says so."""
    safety_checker: Flag = True
    safety_checker_type: Annotated[str, one_of_words("blur", "sensitive_content_text", "pixelate", "black")] = "black"
    enhance_prompt: Flag | None = None
    """yes appends the configured suffix to the prompt."""
    enhance_style: Name = ""
    """Appends the suffix of that style instead."""
    multi_lingual: Flag = False
    """Accepted; prompts are not translated here, and meta says so."""
    lora_model: Names = ()
    lora_strength: Ignored = None
    embeddings_model: Names = ()
    vae: Name = ""
    clip_skip: Annotated[int, Whole(1, 8)] | None = None
    """Layers of the text encoder to leave out; at most as many as the model has."""
    upscale: Annotated[int, BeforeValidator(_upscale)] = 1
    base64: Flag = False
    """yes: every URL of the output serves base64 text."""
    temp: Flag = False
    """yes: the files are deleted after 24 hours."""
    instant_response: Flag = False
    """yes: answer ``processing`` at once."""
    ip_adapter_id: Name = ""
    ip_adapter_scale: Ignored = None
    ip_adapter_image: Text = ""
    webhook: Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)] = None
    """URL that gets one POST when the job has ended. A bad one never refuses a job."""
    track_id: TrackId = None
    """Any scalar, echoed unchanged."""
    loadbalancer: Ignored = None
    """Accepted and ignored: the cluster balances by itself."""


def check_common(wish: GenerationRequest, config: AppConfig, problems: Problems) -> None:
    """Everything about the common fields that needs no look into the catalogue."""
    for field, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
        if len(text.encode(errors="replace")) > MAX_PROMPT_BYTES:
            problems.add(field, f"The {field} field must not be longer than {MAX_PROMPT_BYTES} bytes of UTF-8.")
    if problem := scheduler_problem(wish.scheduler):
        problems.add("scheduler", problem)
    if wish.enhance_style and wish.enhance_style not in config.prompts.styles:
        problems.add("enhance_style", one_of("enhance_style", wish.enhance_style, tuple(config.prompts.styles)))
    if wish.safety_checker and config.safety.required:
        problems.add("safety_checker", "The safety_checker is required here, but no safety model is loaded.")
    for field, given in {
        "lora_model": wish.lora_model,
        "embeddings_model": wish.embeddings_model,
        "vae": wish.vae,
        "upscale": wish.upscale > 1,
        "ip_adapter_id": wish.ip_adapter_id,
        "ip_adapter_image": wish.ip_adapter_image,
    }.items():
        if given:
            problems.add(field, f"The {field} field is not available yet; leave it out.")


def find_base(wish: GenerationRequest, config: AppConfig, catalog: Catalog, problems: Problems) -> ModelEntry | None:
    """The base model that is asked for; what depends on it is checked too. Blocks on the database."""
    entry = _find_base(wish, config, catalog, problems)
    limits = config.limits if entry is None else config.limits.families.get(entry.family, config.limits)
    _check_number("width", wish.width, Whole(64, limits.max_width, 8), problems)
    _check_number("height", wish.height, Whole(64, limits.max_height, 8), problems)
    if entry is not None and wish.clip_skip is not None and entry.max_clip_skip is not None:
        _check_number("clip_skip", wish.clip_skip, Whole(1, entry.max_clip_skip), problems)
    return entry


def _check_number(field: str, value: int, allowed: Whole, problems: Problems) -> None:
    try:
        allowed.read(value)
    except ValueError as error:
        problems.add(field, f"The {field} field {error}.")


def _find_base(wish: GenerationRequest, config: AppConfig, catalog: Catalog, problems: Problems) -> ModelEntry | None:
    if not wish.model_id:
        if "model_id" not in problems:
            problems.missing("model_id")
        return None
    entry = catalog.find(wish.model_id)
    if entry is None or entry.type is not ModelType.BASE:
        known = [model.id for model in catalog.list() if model.type is ModelType.BASE]
        problems.add("model_id", one_of("model_id", wish.model_id, known or ["none is published"]))
        return None
    try:
        config.denoiser_for(entry.family)
    except UnknownModel as error:
        problems.add("model_id", f"The model_id {entry.id!r} cannot be served here. {error.message}")
        return None
    return entry


def final_prompt(wish: GenerationRequest, config: AppConfig) -> str:
    """The prompt with its enhancement. A style asks for enhancement unless ``enhance_prompt`` says no."""
    wanted = wish.enhance_prompt
    if wanted is None:
        wanted = bool(wish.enhance_style) or config.compat.hosted_defaults
    suffix = config.prompts.styles.get(wish.enhance_style, config.prompts.enhance_suffix).strip(" ,")
    if not (wanted and suffix and wish.prompt.strip()):
        return wish.prompt
    return f"{wish.prompt.rstrip(' ,')}, {suffix}"


def effective_seed(wish: GenerationRequest) -> int:
    return secrets.randbelow(MAX_SEED + 1) if wish.seed is None else wish.seed


def effective_algorithm(wish: GenerationRequest) -> str:
    """``algorithm_type`` where the scheduler knows it, else ``none``."""
    return wish.algorithm_type if wish.algorithm_type in SCHEDULERS[wish.scheduler].algorithm_types else "none"


def storable_webhook(url: str | None, config: AppConfig) -> str | None:
    """A webhook as the job keeps it: cut just beyond the allowed length, so that delivery refuses it, not the row."""
    if url is None:
        return None
    return url.encode(errors="replace").decode()[: config.fetch.max_url_length + 1]


def yes_no(flag: bool) -> str:
    return "yes" if flag else "no"


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a request: links are left alone, inline ones are checked and at hand as bytes."""

    links: tuple[InputRef, ...]
    inline: Mapping[str, bytes]
    """Input field -> encoded bytes."""
    echo: Mapping[str, str]
    """Input field -> what meta shows: the link as sent, or the URL of the stored copy; never the data."""


async def take_pictures(
    sources: Mapping[str, str], services: Services, file_prefix: str, problems: Problems
) -> Pictures:
    """Check each picture of ``sources`` (input field -> link, base64 or data URI) before a job exists.

    Raises:
        BodyTooLarge: a picture is larger than any that would be accepted.
    """
    links: list[InputRef] = []
    inline: dict[str, bytes] = {}
    echo: dict[str, str] = {}
    for source, text in sources.items():
        field = source.partition(".")[0]
        if classify(text) == "url":
            if problem := url_problem(text, services.config.fetch):
                problems.add(field, f"The {field} link is refused: {problem}")
            links.append(InputRef(field=source, url=text))
            echo[source] = text
            continue
        if len(text) > services.config.images.max_bytes * MAX_BASE64_PER_BYTE:
            raise BodyTooLarge(f"The {field} picture is larger than {services.config.images.max_bytes} bytes.")
        try:
            async with services.decoding:
                inline[source] = await asyncio.to_thread(_inline_bytes, source, text, services.config)
        except ImageRejected as error:
            problems.add(field, f"The {field} field is not an image this API accepts: {error.message}")
        echo[source] = f"{services.config.public_url}/inputs/{file_prefix}-{source}"
    return Pictures(tuple(links), inline, echo)


def _inline_bytes(source: str, text: str, config: AppConfig) -> bytes:
    """Decode fully, so that 'not an image' is an answer to the request and not a failed job."""
    data = decode_base64(text, config.images.max_bytes)
    if source == "mask_image":
        decode_mask(data, config.images)
    else:
        decode_image(data, config.images)
    return data
