"""Saves what was trained in diffusers layout, as half-precision safetensors: the files that the package ships.

``python -m serve_app.models.demo.export --work FOLDER`` puts them where ``install_demo`` takes them from.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline

from serve_app.models.demo import DEMO_CONTROL_TYPES, DEMO_ID, TRAINED, VERSION_FILE, demo_net_id, version_of
from serve_app.models.demo.control import POOLED
from serve_app.models.demo.networks import NOISE_SCHEDULE, make_net
from serve_app.models.demo.train import STAGES, autoencoder, diffusion_model
from serve_app.models.demo.training import curve, restore
from serve_app.models.sources import resolve


def export(work: Path, folder: Path, control_types: Iterable[str] = DEMO_CONTROL_TYPES) -> Path:
    """Write the base model and the nets of ``control_types`` under ``folder``, whose content they replace, with the
    loss curves of all stages beside them.

    Raises:
        FileNotFoundError: one of them was not trained in ``work``.
        FileExistsError: ``folder`` holds something else than a demo model.
    """
    if folder.exists() and not (folder / VERSION_FILE).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else than a demo model; name another folder")
    model = diffusion_model(work)
    nets = {control_type: make_net(model.unet, global_pool=control_type == POOLED) for control_type in control_types}
    for control_type, net in nets.items():
        restore(net, work / control_type)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(work),
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, **NOISE_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(folder / DEMO_ID, safe_serialization=True)
    for control_type, net in nets.items():
        net.to(dtype=torch.float16).save_pretrained(folder / demo_net_id(control_type), safe_serialization=True)
    hashes = [resolve(each).hash() for each in (folder / DEMO_ID, *(folder / demo_net_id(name) for name in nets))]
    curves = {stage: curve(work / stage) for stage in STAGES if (work / stage / "curve.jsonl").exists()}
    (folder / "curves.json").write_text(json.dumps(curves, indent=None, separators=(",", ":")))
    (folder / VERSION_FILE).write_text(version_of(hashes))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training")
    parser.add_argument("--folder", type=Path, default=TRAINED, help="where to write, by default into the package")
    options = parser.parse_args()
    export(options.work, options.folder)


if __name__ == "__main__":
    main()
