"""The request example of the API's page, and the keys of its answer's ``meta``, in order."""

from typing import Any

SEED_META = [
    "prompt", "model_id", "controlnet_model", "controlnet_type", "negative_prompt", "scheduler", "safetychecker",
    "auto_hint", "guess_mode", "strength", "W", "H", "guidance_scale", "seed", "multi_lingual", "init_image",
    "mask_image", "steps", "full_url", "upscale", "n_samples", "embeddings", "lora", "outdir", "file_prefix",
]  # fmt: skip


def seed_page_body(key: str, model_id: str, init_image: str) -> dict[str, Any]:
    """The example with a key, a model and a picture that exist here."""
    return {
        "key": key,
        "controlnet_model": "canny",
        "controlnet_type": "canny",
        "model_id": model_id,
        "auto_hint": "yes",
        "guess_mode": "no",
        "prompt": "a model doing photoshoot, ultra high resolution, 4K image",
        "negative_prompt": None,
        "init_image": init_image,
        "mask_image": None,
        "width": "512",
        "height": "512",
        "samples": "1",
        "scheduler": "UniPCMultistepScheduler",
        "num_inference_steps": "30",
        "safety_checker": "no",
        "enhance_prompt": "yes",
        "guidance_scale": 7.5,
        "strength": 0.55,
        "seed": None,
        "webhook": None,
        "track_id": None,
    }
