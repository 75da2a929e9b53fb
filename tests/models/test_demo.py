import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from serve_app.annotators import ANNOTATORS
from serve_app.controls import CONTROL_TYPES
from serve_app.models.demo import DEMO_CONTROL_TYPES, TRAINED, install_demo, version_of
from serve_app.models.demo.tokenizer import build_tokenizer
from serve_app.models.sources import resolve

SIDE = 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return install_demo(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def pipeline(demo: dict[str, Path]) -> Any:
    made = StableDiffusionPipeline.from_pretrained(
        demo["demo"], local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
    )
    made.set_progress_bar_config(disable=True)
    return made


def guided(pipeline: Any, net: ControlNetModel) -> Any:
    made = StableDiffusionControlNetPipeline(**pipeline.components, controlnet=net, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompt: str = "a red fox", steps: int = 2, **options: Any) -> NDArray[np.float32]:
    """(H, W, 3), 0..1."""
    generator = torch.Generator().manual_seed(3)
    size = {"width": SIDE, "height": SIDE}
    result = pipeline(prompt, num_inference_steps=steps, generator=generator, output_type="np", **size, **options)
    return np.asarray(result.images[0])


def picture() -> torch.Tensor:
    """Left half dark, right half bright red; (1, 3, H, W), 0..1."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, 0, :, SIDE // 2 :] = 0.9
    return image


def test_every_control_type_that_needs_no_weights_has_a_net() -> None:
    others = {"aesthetic-controlnet", "qrcode"}  # nets of other projects, with these control types' maps
    weightless = {name for name, row in CONTROL_TYPES.items() if not ANNOTATORS[row.annotator].networks}
    assert set(DEMO_CONTROL_TYPES) >= weightless - others


def test_the_demo_is_the_same_everywhere(demo: dict[str, Path], tmp_path: Path) -> None:
    again = install_demo(tmp_path / "elsewhere")
    for name, folder in demo.items():
        assert resolve(again[name]).hash() == resolve(folder).hash(), name
    hashes = [resolve(folder).hash() for folder in demo.values()]
    assert len(set(hashes)) == len(demo)
    assert (TRAINED / "VERSION").read_text() == version_of(hashes), "installed servers would keep the old weights"


def test_a_complete_demo_is_kept_and_another_version_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "half").write_text("an attempt that was cut off")
    (tmp_path / ".demo.partial").mkdir()
    base = install_demo(folder)["demo"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert not (folder / "half").exists()
    kept = (base / "model_index.json").stat().st_ino
    install_demo(folder)
    assert (base / "model_index.json").stat().st_ino == kept
    (folder / "VERSION").write_text("0")
    install_demo(folder)
    assert (base / "model_index.json").stat().st_ino != kept


def test_a_copy_of_a_read_only_package_can_be_replaced(tmp_path: Path) -> None:
    package = Path(shutil.copytree(TRAINED, tmp_path / "package"))
    for path in (*package.rglob("*"), package):
        path.chmod(path.stat().st_mode & ~0o222)
    install_demo(tmp_path / "demo", package)
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "demo", *(tmp_path / "demo").rglob("*")))


def test_pictures_are_no_constant_and_follow_prompt_and_seed(pipeline: Any) -> None:
    fox = draw(pipeline)
    assert np.isfinite(fox).all()
    assert fox.std() > 0.05
    assert np.array_equal(fox, draw(pipeline))
    assert np.abs(fox - draw(pipeline, "a castle by the sea")).mean() > 0.002


@pytest.mark.parametrize("control_type", DEMO_CONTROL_TYPES)
def test_every_net_changes_the_picture(control_type: str, pipeline: Any, demo: dict[str, Path]) -> None:
    net = ControlNetModel.from_pretrained(demo[f"demo-{control_type}"], local_files_only=True, use_safetensors=True)
    made = guided(pipeline, net)
    free = draw(pipeline)
    unguided = draw(made, image=picture(), controlnet_conditioning_scale=0.0)
    assert np.abs(unguided - free).max() < 1e-4
    controlled = draw(made, image=picture())
    assert np.abs(controlled - free).mean() > 0.02
    assert net.config.global_pool_conditions == (control_type == "shuffle")


def test_the_vae_gives_back_what_it_was_given(pipeline: Any) -> None:
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), 128)
    with torch.no_grad():
        latent = pipeline.vae.encode(image * 2 - 1).latent_dist.mode()
        decoded = (pipeline.vae.decode(latent).sample + 1) / 2
    assert latent.shape == (1, 4, 16, 16)
    assert (decoded - image).abs().mean() < 0.1
    assert np.corrcoef(decoded.flatten(), image.flatten())[0, 1] > 0.9


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


@pytest.mark.parametrize(
    "text", ["", "a red fox", "Ein Mädchen, 8k!", "狐狸 🦊 ñandú", "<|endoftext|> x", "\x00\t\n", "a" * 2000]
)
def test_any_text_has_tokens(text: str, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id == len(tokenizer) - 1 in ids
    assert max(ids) < len(tokenizer)


def test_common_words_are_one_token_each(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("a photo of the red castle") == [
        "a</w>", "photo</w>", "of</w>", "the</w>", "red</w>", "castle</w>",
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer("grüne Füchse").input_ids, skip_special_tokens=True) == "grüne füchse"


def test_the_folder_may_be_moved(pipeline: Any, demo: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(demo["demo"], tmp_path / "copy")
    other = StableDiffusionPipeline.from_pretrained(
        copy, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
    )
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(other), draw(pipeline))
