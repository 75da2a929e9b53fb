"""The reference: what diffusers' own pipelines draw for a request."""

import copy
from typing import Any

import diffusers
import torch
from PIL import Image
from transformers import CLIPTextModel

from serve_app.engine.request import GenerationRequest
from serve_app.schedulers import SCHEDULERS
from serve_app.tasks import GenerationTask, Mode

PIPELINES = {
    (Mode.TEXT, False): "StableDiffusionPipeline",
    (Mode.TEXT, True): "StableDiffusionControlNetPipeline",
    (Mode.IMAGE, False): "StableDiffusionImg2ImgPipeline",
    (Mode.IMAGE, True): "StableDiffusionControlNetImg2ImgPipeline",
    (Mode.MASKED, False): "StableDiffusionInpaintPipeline",
    (Mode.MASKED, True): "StableDiffusionControlNetInpaintPipeline",
}


def reference_scheduler(wanted: GenerationTask, config: Any) -> Any:
    """Configured by hand, as a user of diffusers would."""
    spec = SCHEDULERS[wanted.scheduler]
    options = dict(spec.options)
    if spec.karras:
        options["use_karras_sigmas"] = wanted.use_karras_sigmas
    if wanted.algorithm_type != "none":
        options["algorithm_type"] = "dpmsolver++"
    return getattr(diffusers, spec.class_name).from_config(dict(config), **options)


def nested(encoder: CLIPTextModel) -> CLIPTextModel:
    """diffusers' clip_skip reads ``text_model.final_layer_norm``; transformers 5 has one level less."""
    shallow = copy.copy(encoder)
    shallow.__dict__["text_model"] = encoder
    return shallow


def reference(asked: GenerationRequest) -> torch.Tensor:
    """Final latents (n, 4, h, w) of diffusers' pipeline for the same request."""
    wanted, base = asked.task, asked.base
    parts = {
        "vae": base.vae,
        "text_encoder": nested(base.text_encoder),
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": reference_scheduler(wanted, base.scheduler_config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    options: dict[str, Any] = {}
    maps = [Image.fromarray(drawn) for drawn in asked.maps]
    if asked.nets:
        parts["controlnet"] = [net.net for net in asked.nets] if len(asked.nets) > 1 else asked.nets[0].net
        many = len(asked.nets) > 1
        options = {
            "image" if wanted.mode is Mode.TEXT else "control_image": maps if many else maps[0],
            "guess_mode": wanted.guess_mode,
            "control_guidance_start": [control.start for control in wanted.controls],
            "control_guidance_end": [control.end for control in wanted.controls],
        }
        scales = [control.scale for control in wanted.controls]
        options["controlnet_conditioning_scale"] = scales if many else scales[0]
    if asked.init_image is not None:
        options |= {"image": Image.fromarray(asked.init_image), "strength": wanted.strength}
    if asked.mask is not None:
        options["mask_image"] = Image.fromarray(asked.mask)
    if wanted.mode is not Mode.IMAGE or asked.nets:
        options |= {"height": wanted.height, "width": wanted.width}
    pipeline = getattr(diffusers, PIPELINES[wanted.mode, bool(asked.nets)])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in wanted.seeds]
    drawn: torch.Tensor = pipeline(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        num_images_per_prompt=wanted.samples,
        generator=generators,
        clip_skip=wanted.clip_skip,
        output_type="latent",
        **options,
    ).images
    return drawn
