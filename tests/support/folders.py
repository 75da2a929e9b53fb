"""Tiny models as folders, in the layouts in which they are published."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers

from serve_app.models.components import BaseComponents, NetComponents

REVISION = "0123456789abcdef0123456789abcdef01234567"


def save_base(base: BaseComponents, folder: Path, *, task: str = "", **options: Any) -> Path:
    """As diffusers saves a pipeline; ``options`` go to ``save_pretrained`` (variant, max_shard_size)."""
    parts: dict[str, Any] = {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": diffusers.EulerDiscreteScheduler.from_config(dict(base.scheduler_config)),
    }
    if base.text_encoder_2 is None:
        name = f"StableDiffusion{task}Pipeline"
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        name = f"StableDiffusionXL{task}Pipeline"
        parts |= {"text_encoder_2": base.text_encoder_2, "tokenizer_2": base.tokenizer_2}
        parts["force_zeros_for_empty_prompt"] = base.zero_empty_negative
    getattr(diffusers, name)(**parts).save_pretrained(folder, safe_serialization=True, **options)
    return folder


def save_net(net: NetComponents, folder: Path, **options: Any) -> Path:
    net.net.save_pretrained(folder, safe_serialization=True, **options)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def as_hub_cache(model: Path, folder: Path) -> Path:
    """Lay ``model`` out as a hub cache does: blobs by hash, and a snapshot of relative links to them."""
    repository = folder / "models--someone--something"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for file in (path for path in model.rglob("*") if path.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(file.relative_to(model).parts) + 1)
        link.symlink_to(f"{up}blobs/{blob.name}")
    return repository
