"""The reference: what diffusers' own pipelines draw for a request."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPTextModel

from serve_app.controls import CONTROL_TYPES
from serve_app.engine.request import GenerationRequest
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import GenerationTask, Mode
from support.tiny import drawn_alone, latents, relative_error

TOLERANCE = 1e-4
ERRORS: list[float] = []
"""Of every comparison of this session; its end tells the worst."""

_MODES = {Mode.TEXT: "", Mode.IMAGE: "Img2Img", Mode.MASKED: "Inpaint"}


def _pipeline_name(asked: GenerationRequest) -> str:
    xl = "XL" if asked.base.text_encoder_2 is not None else ""
    union = "Union" if any(net.union for net in asked.nets) else ""
    return f"StableDiffusion{xl}{'ControlNet' if asked.nets else ''}{union}{_MODES[asked.task.mode]}Pipeline"


def reference_scheduler(wanted: GenerationTask, config: Any) -> Any:
    """Configured by hand, as a user of diffusers would."""
    spec = SCHEDULERS[wanted.scheduler]
    options = dict(spec.options)
    if spec.karras:
        options["use_karras_sigmas"] = wanted.use_karras_sigmas
    if wanted.algorithm_type != "none":
        options["algorithm_type"] = "dpmsolver++"
    if wanted.scheduler == "DPMSolverSDEScheduler":
        options["noise_sampler_seed"] = wanted.seeds if wanted.samples > 1 else wanted.seed
    return getattr(diffusers, spec.class_name).from_config(dict(config), **options)


def nested(encoder: CLIPTextModel) -> CLIPTextModel:
    """diffusers' clip_skip reads ``text_model.final_layer_norm``; transformers 5 has one level less."""
    shallow = copy.copy(encoder)
    shallow.__dict__["text_model"] = encoder
    return shallow


def _parts(asked: GenerationRequest) -> dict[str, Any]:
    base = asked.base
    parts = {
        "vae": base.vae,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": reference_scheduler(asked.task, base.scheduler_config),
    }
    if base.text_encoder_2 is None:
        no_checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts |= {"text_encoder": nested(base.text_encoder), **no_checker}
    else:
        parts |= {
            "text_encoder": base.text_encoder,
            "text_encoder_2": base.text_encoder_2,
            "tokenizer_2": base.tokenizer_2,
            "force_zeros_for_empty_prompt": base.zero_empty_negative,
        }
    return parts


def _control_options(asked: GenerationRequest) -> tuple[Any, dict[str, Any]]:
    """The ``controlnet`` of the pipeline, and what its call takes for it."""
    wanted = asked.task
    nets = [net.net for net in asked.nets]
    maps = [Image.fromarray(drawn) for drawn in asked.maps]
    scales = [control.scale for control in wanted.controls]
    options: dict[str, Any] = {
        "guess_mode": wanted.guess_mode,
        "control_guidance_start": [control.start for control in wanted.controls],
        "control_guidance_end": [control.end for control in wanted.controls],
    }
    if all(net.union for net in asked.nets):
        modes = [CONTROL_TYPES[control.control_type].union for control in wanted.controls]
        options |= {"control_image": maps, "control_mode": modes, "controlnet_conditioning_scale": scales}
        return (nets[0] if len(set(map(id, nets))) == 1 else nets), options
    many = len(nets) > 1
    options["image" if wanted.mode is Mode.TEXT else "control_image"] = maps if many else maps[0]
    options["controlnet_conditioning_scale"] = scales if many else scales[0]
    return (nets if many else nets[0]), options


def reference(asked: GenerationRequest) -> torch.Tensor:
    """Final latents (n, 4, h, w) of diffusers' pipeline for the same request.

    For requests that a pipeline can do: all nets union nets, or none; the same union net, or each another one.
    """
    wanted, base = asked.task, asked.base
    parts = _parts(asked)
    options: dict[str, Any] = {}
    if asked.nets:
        parts["controlnet"], options = _control_options(asked)
    if asked.init_image is not None:
        options |= {"image": Image.fromarray(asked.init_image), "strength": wanted.strength}
    if asked.mask is not None:
        options["mask_image"] = Image.fromarray(asked.mask)
    if wanted.mode is not Mode.IMAGE or asked.nets:
        options |= {"height": wanted.height, "width": wanted.width}
    no_negative = base.zero_empty_negative and not wanted.negative_prompt
    pipeline = getattr(diffusers, _pipeline_name(asked))(**parts)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in wanted.seeds]
    with _as_many_types_as_rows(asked):
        drawn: torch.Tensor = pipeline(
            wanted.prompt,
            negative_prompt=None if no_negative else wanted.negative_prompt,
            num_inference_steps=wanted.steps,
            guidance_scale=wanted.guidance_scale,
            num_images_per_prompt=wanted.samples,
            generator=generators,
            clip_skip=wanted.clip_skip,
            output_type="latent",
            **options,
        ).images
    return drawn


@contextmanager
def _as_many_types_as_rows(asked: GenerationRequest) -> Iterator[None]:
    """diffusers 0.42 crashes in guess mode with a union net: one row comes with the control types of two."""

    def cut(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, options | {"control_type": options["control_type"][: len(args[0])]}

    unions = {id(net.net): net.net for net in asked.nets if net.union and asked.task.guess_mode}
    hooks = [net.register_forward_pre_hook(cut, with_kwargs=True) for net in unions.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def assert_parity(asked: GenerationRequest) -> None:
    """We draw what diffusers draws."""
    error = relative_error(latents(drawn_alone(asked)), reference(asked))
    ERRORS.append(error)
    assert error < TOLERANCE
