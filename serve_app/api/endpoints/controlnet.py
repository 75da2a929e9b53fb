"""``POST controlnet``: pictures under the control of one or more ControlNets."""

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, JsonValue

from serve_app.api.endpoints.acceptance import accept
from serve_app.api.endpoints.generation import (
    OUT_FOLDER,
    GenerationRequest,
    Pictures,
    check_common,
    effective_algorithm,
    effective_seed,
    final_prompt,
    find_base,
    storable_webhook,
    take_pictures,
    yes_no,
)
from serve_app.api.endpoints.hints import AnnotatorNames, AnnotatorParams, check_ready, choose_annotators
from serve_app.api.envelopes import Answer
from serve_app.api.fields import (
    Flag,
    Names,
    Picture,
    Problems,
    Real,
    Reals,
    absent,
    parse,
    per_item,
    read_items,
    read_picture,
)
from serve_app.api.operations import Call
from serve_app.config import AppConfig
from serve_app.controls import CONTROL_TYPES, control_type_problem
from serve_app.errors import one_of
from serve_app.jobs.job import JobSpec
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.schedulers import SCHEDULERS, needs_image_problem
from serve_app.tasks import ControlInput, GenerationTask, Mode, OutputOptions

MAX_SCALE = 20


def _pictures(value: JsonValue) -> tuple[str, ...]:
    """A list of pictures, or one string with commas.

    Links and data URIs may hold commas themselves: a part that starts no picture belongs to the one before it. So a
    link followed by raw base64 has to be sent as a list. Empty parts are not given, as everywhere else.
    """
    parts = read_items(value)
    if isinstance(value, list):
        return tuple(read_picture(part) for part in parts if not absent(part))
    pictures: list[list[str]] = []  # in pieces, joined once: each may be as long as the body
    commas = False
    for part in map(str, parts):
        head = part.lstrip()[:8].lower()
        if pictures and commas and not head.startswith(("http://", "https://", "data:")):
            pictures[-1].append(part)
        else:
            pictures.append([part.strip()])
            commas = head.startswith(("http", "data:"))
    return tuple(filter(None, map(",".join, pictures)))


class ControlNetRequest(GenerationRequest):
    """Body of ``POST controlnet``. ``prompt`` is required unless ``guess_mode`` is on."""

    model_config = ConfigDict(json_schema_extra={"required": ["key", "model_id", "controlnet_model"]})

    controlnet_model: Names = ()
    """One id or a comma list: built-in control types, or ids of loaded ControlNets."""
    controlnet_type: Names = ()
    """For loaded ControlNets: the control type that picks the annotator. Built-in ids carry their own."""
    auto_hint: Flag = True
    """no: the image is the control map itself."""
    guess_mode: Flag = False
    """yes: the prompt may be empty."""
    init_image: Picture = ""
    """Link, base64 or data URI."""
    control_image: Annotated[tuple[str, ...], BeforeValidator(_pictures)] = ()
    """What the control maps are made from: one per ControlNet, or one for all. Default: init_image."""
    mask_image: Picture = ""
    """White is painted again; needs init_image."""
    strength: Annotated[float, Real(0, 1, above=True)] = 1.0
    """How much of init_image is drawn anew; exactly 1 draws from noise, or with DDIMInverseScheduler from the image's
    own noise."""
    controlnet_conditioning_scale: Annotated[tuple[float, ...], Reals(0, MAX_SCALE)] = ()
    """Default 1."""
    control_guidance_start: Annotated[tuple[float, ...], Reals(0, 1)] = ()
    """Default 0."""
    control_guidance_end: Annotated[tuple[float, ...], Reals(0, 1)] = ()
    """Default 1."""
    annotator: AnnotatorNames = ()
    """What makes the control maps: one name per ControlNet, or one for all; ``GET annotators`` lists them."""
    annotator_params: AnnotatorParams = ()
    """The annotator's parameters by name: one object for all, of which each annotator takes what it knows, or a list
    with one per ControlNet, null for the defaults. ``{"canny": {...}}`` in it holds for that type alone."""
    return_control_maps: Flag = False
    """yes: the answer has the control maps too, as ``control_maps``."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The names of a request, resolved against the catalogue."""

    base: ModelEntry
    controls: tuple[ControlInput, ...]


async def controlnet(call: Call) -> Answer:
    """Generate images under the control of one or more ControlNets.

    Waits for the result at most the configured time, then answers ``processing`` with a link to fetch it.
    """
    services = call.services
    wish, problems = parse(ControlNetRequest, call.fields)
    check_common(wish, services.config, problems)
    _check_own(wish, services.config, problems)
    plan = await asyncio.to_thread(_resolve, wish, services.config, services.catalog, problems)
    if plan is not None:
        remedy = "Or send the control map itself with auto_hint: no."
        await check_ready(plan.controls, services, problems, remedy)
    file_prefix = str(uuid.uuid4())
    sources = _sources(wish, services.config.limits.max_controls)
    pictures = await take_pictures(sources, services, file_prefix, problems)
    problems.raise_if_any()
    if plan is None:
        raise AssertionError("a request without a plan has a problem")
    spec = _job_spec(wish, services.config, plan, pictures, file_prefix)
    return await accept(call, spec, pictures.inline, instant=wish.instant_response)


def _sources(wish: ControlNetRequest, max_controls: int) -> dict[str, str]:
    """Input field -> picture as sent. Control images beyond the limit are a problem already and not looked at."""
    sources = {"init_image": wish.init_image, "mask_image": wish.mask_image}
    sources |= {f"control_image.{index}": text for index, text in enumerate(wish.control_image[:max_controls])}
    return {field: text for field, text in sources.items() if text}


def _check_own(wish: ControlNetRequest, config: AppConfig, problems: Problems) -> None:
    count = len(wish.controlnet_model)
    if not count and "controlnet_model" not in problems:
        problems.missing("controlnet_model")
    if count > config.limits.max_controls:
        allowed = config.limits.max_controls
        problems.add("controlnet_model", f"The controlnet_model field has {count} ids; at most {allowed} are allowed.")
    if not wish.prompt.strip() and not wish.guess_mode and "prompt" not in problems:
        problems.missing("prompt")
    if not wish.init_image and "init_image" not in problems:
        if wish.mask_image:
            problems.add("init_image", "The init_image field is required with mask_image.")
        elif problem := needs_image_problem(wish.scheduler):
            problems.add("init_image", problem)
        elif not wish.control_image and "control_image" not in problems:
            problems.add("init_image", "The init_image field is required unless control_image is given.")
    if count and len(wish.control_image) not in {0, 1, count}:
        problems.add(
            "control_image",
            f"The control_image field has {len(wish.control_image)} pictures for {count} ControlNets; send one for "
            "each or one for all.",
        )


def _resolve(wish: ControlNetRequest, config: AppConfig, catalog: Catalog, problems: Problems) -> Plan | None:
    """Find the base model and the ControlNets; None when a problem was added. Blocks on the database."""
    base = find_base(wish, config, catalog, problems)
    if base is not None and base.inpaints and not wish.mask_image and "mask_image" not in problems:
        problems.add("mask_image", f"The mask_image field is required: the model_id {base.id!r} only repaints.")
    if len(wish.controlnet_model) > config.limits.max_controls:
        return None
    controls = _controls(wish, catalog, base, problems)
    if base is None or len(controls) != len(wish.controlnet_model):
        return None
    return Plan(base, controls)


def _controls(
    wish: ControlNetRequest, catalog: Catalog, base: ModelEntry | None, problems: Problems
) -> tuple[ControlInput, ...]:
    count = len(wish.controlnet_model)
    scales = per_item(wish.controlnet_conditioning_scale, count, 1.0, "controlnet_conditioning_scale", problems.add)
    starts = per_item(wish.control_guidance_start, count, 0.0, "control_guidance_start", problems.add)
    ends = per_item(wish.control_guidance_end, count, 1.0, "control_guidance_end", problems.add)
    nets: list[str | None] = []
    kinds: list[str] = []
    for index, (name, start, end) in enumerate(zip(wish.controlnet_model, starts, ends, strict=True)):
        if start >= end:
            problems.add(
                "control_guidance_start",
                f"The control_guidance_start {start:g} must be below control_guidance_end {end:g}.",
            )
        net, kind = _net(name, index, wish, catalog, base, problems) or (None, name)
        nets.append(net)
        if kind not in CONTROL_TYPES:
            continue
        kinds.append(kind)
        if CONTROL_TYPES[kind].needs_mask and not wish.mask_image and "mask_image" not in problems:
            problems.add("mask_image", f"The mask_image field is required with controlnet_model {name!r}.")
    if len(kinds) != count:
        return ()
    maps = choose_annotators(kinds, wish.annotator, wish.annotator_params, wish.auto_hint, problems)
    return tuple(
        ControlInput(**dict(one), net=net, scale=scale, start=start, end=end)
        for one, net, scale, start, end in zip(maps, nets, scales, starts, ends, strict=False)
        if net is not None
    )


def _net(
    name: str, index: int, wish: ControlNetRequest, catalog: Catalog, base: ModelEntry | None, problems: Problems
) -> tuple[str, str] | None:
    """Catalogue id and control type of one name of ``controlnet_model``; None when a problem was added."""
    if name in CONTROL_TYPES:
        if problem := control_type_problem(name):
            problems.add("controlnet_model", problem)
        elif base is not None:
            entry = catalog.net_for(name, base.family)
            if entry is not None:
                return entry.id, name
            problems.add("controlnet_model", _no_net(name, base, catalog))
        return None
    entry = catalog.find(name)
    if entry is None or entry.type is not ModelType.CONTROLNET:
        known = [model.id for model in catalog.list() if model.type is ModelType.CONTROLNET]
        problems.add("controlnet_model", one_of("controlnet_model", name, [*CONTROL_TYPES, *known]))
        return None
    if base is not None and entry.family != base.family:
        problems.add(
            "controlnet_model",
            f"The controlnet_model {name!r} is of the family {entry.family!r}, the model_id {base.id!r} of "
            f"{base.family!r}. Allowed: {_nets_of(base, catalog)}.",
        )
        return None
    control_type = _type_of(entry, index, wish, problems)
    return (entry.id, control_type) if control_type is not None else None


def _no_net(name: str, base: ModelEntry, catalog: Catalog) -> str:
    usual = CONTROL_TYPES[name].nets.get(base.family)
    hint = f" The usual one is {usual}." if usual else ""
    return (
        f"No ControlNet for {name!r} is loaded for the family {base.family!r} of the model_id {base.id!r}.{hint} "
        f"Allowed: {_nets_of(base, catalog)}."
    )


def _nets_of(base: ModelEntry, catalog: Catalog) -> str:
    names = [name for net in catalog.nets(base.family) for name in (*net.control_types, net.id)]
    return ", ".join(dict.fromkeys(names)) or "none is loaded"


def _type_of(entry: ModelEntry, index: int, wish: ControlNetRequest, problems: Problems) -> str | None:
    """The control type of a loaded ControlNet: as sent (parallel to the ids, or one for all), else its own.

    A ControlNet-Union has no type of its own, and knows some.
    """
    union = entry.union_types is not None
    types = wish.controlnet_type
    if not types and entry.control_type is not None and not union:
        types = (entry.control_type,)
    if not types:
        allowed = ", ".join(entry.control_types if union else CONTROL_TYPES)
        problems.add("controlnet_type", f"The controlnet_type field is required with {entry.id!r}. Allowed: {allowed}.")
        return None
    if len(types) not in {1, len(wish.controlnet_model)}:
        problems.add(
            "controlnet_type",
            f"The controlnet_type field has {len(types)} types for {len(wish.controlnet_model)} ControlNets; send one "
            "for each or one for all.",
        )
        return None
    control_type = types[0] if len(types) == 1 else types[index]
    problem = control_type_problem(control_type)
    if problem is None and union and control_type not in entry.control_types:
        problem = f"{entry.id!r} knows no {control_type!r}. Allowed: {', '.join(entry.control_types)}."
    if problem is not None:
        problems.add("controlnet_type", problem)
        return None
    return control_type


def _mode(wish: ControlNetRequest) -> Mode:
    """Strength 1 destroys all of the init image, so that nothing of it is needed but its control map.

    Except where the scheduler inverts it: then strength 1 takes the image all the way back to noise, its own.
    """
    if wish.mask_image:
        return Mode.MASKED
    used = wish.strength < 1 or SCHEDULERS[wish.scheduler].needs_image
    return Mode.IMAGE if wish.init_image and used else Mode.TEXT


def _control_sources(wish: ControlNetRequest, controls: Sequence[ControlInput]) -> tuple[str, ...]:
    """Per control the input field its map is made from. An inpaint net's is always the picture that is repainted."""

    def source(index: int, control: ControlInput) -> str:
        if not wish.control_image or CONTROL_TYPES[control.control_type].needs_mask:
            return "init_image"
        return f"control_image.{index if len(wish.control_image) > 1 else 0}"

    return tuple(source(index, control) for index, control in enumerate(controls))


def _job_spec(wish: ControlNetRequest, config: AppConfig, plan: Plan, pictures: Pictures, file_prefix: str) -> JobSpec:
    task = GenerationTask(
        model=plan.base.id,
        family=plan.base.family,
        prompt=final_prompt(wish, config),
        negative_prompt=wish.negative_prompt,
        width=wish.width,
        height=wish.height,
        samples=wish.samples,
        seed=effective_seed(wish),
        scheduler=wish.scheduler,
        steps=wish.num_inference_steps,
        guidance_scale=wish.guidance_scale,
        strength=wish.strength,
        use_karras_sigmas=wish.use_karras_sigmas and SCHEDULERS[wish.scheduler].karras,
        algorithm_type=effective_algorithm(wish),
        guess_mode=wish.guess_mode,
        clip_skip=wish.clip_skip,
        controls=plan.controls,
        mode=_mode(wish),
    )
    return JobSpec(
        endpoint="controlnet",
        task=task,
        inputs=pictures.links,
        control_sources=_control_sources(wish, plan.controls),
        output=OutputOptions(file_prefix=file_prefix, base64_text=wish.base64),
        meta=_meta(wish, task, pictures.echo, file_prefix),
        return_maps=wish.return_control_maps,
        temp=wish.temp,
        webhook=storable_webhook(wish.webhook, config),
        track_id=wish.track_id,
    )


def _meta(
    wish: ControlNetRequest, task: GenerationTask, echo: Mapping[str, str], file_prefix: str
) -> dict[str, JsonValue]:
    """The request under the old names: first the keys of the original documentation, then ours."""
    control_images = [text for field, text in echo.items() if field.startswith("control_image.")]
    return {
        "prompt": task.prompt,
        "model_id": task.model,
        "controlnet_model": ",".join(wish.controlnet_model),
        "controlnet_type": ",".join(control.control_type for control in task.controls),
        "negative_prompt": task.negative_prompt,
        "scheduler": task.scheduler,
        "safetychecker": "no",
        "auto_hint": yes_no(wish.auto_hint),
        "guess_mode": yes_no(task.guess_mode),
        "strength": task.strength,
        "W": task.width,
        "H": task.height,
        "guidance_scale": task.guidance_scale,
        "seed": task.seed,
        "multi_lingual": "no",
        "init_image": echo.get("init_image"),
        "mask_image": echo.get("mask_image"),
        "steps": task.steps,
        "full_url": "no",
        "upscale": "no",
        "n_samples": task.samples,
        "embeddings": None,
        "lora": None,
        "outdir": OUT_FOLDER,
        "file_prefix": file_prefix,
        "control_image": list[JsonValue](control_images),
        "controlnet_conditioning_scale": [control.scale for control in task.controls],
        "control_guidance_start": [control.start for control in task.controls],
        "control_guidance_end": [control.end for control in task.controls],
        "use_karras_sigmas": yes_no(task.use_karras_sigmas),
        "algorithm_type": task.algorithm_type,
        "clip_skip": task.clip_skip,
        "tomesd": "no",
        "base64": yes_no(wish.base64),
        "temp": yes_no(wish.temp),
        "return_control_maps": yes_no(wish.return_control_maps),
    }
