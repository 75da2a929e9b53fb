import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import ModelSource
from serve_app.errors import FamilyMismatch, ModelLoadFailed, UnsafeModel
from serve_app.models.catalog import Catalog, ModelEntry
from serve_app.models.demo.build import build_tiny_base
from serve_app.models.loading import load_base, load_net
from serve_app.models.publish import publish

CPU = torch.device("cpu")


@pytest.fixture
def base_entry(catalog: Catalog, base: Path) -> ModelEntry:
    return publish(catalog, ModelSource(id="dream", path=base))


@pytest.fixture
def net_entry(catalog: Catalog, net: Path) -> ModelEntry:
    return publish(catalog, ModelSource(id="edges", path=net, control_type="canny"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_model_is_loaded_ready_to_use(dtype: torch.dtype, base_entry: ModelEntry) -> None:
    base = load_base(base_entry, CPU, dtype)
    assert (base.id, base.family, base.hash) == ("dream", "custom16", base_entry.hash)
    assert base.vae_scale == 8
    assert base.scheduler_config["beta_schedule"] == "scaled_linear"
    modules = (base.unet, base.vae, base.text_encoder)
    for module in modules:
        assert not module.training
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert not any(parameter.requires_grad for parameter in module.parameters())
    parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert parameters * dtype.itemsize <= base.size_bytes <= parameters * dtype.itemsize + 8 * 77
    assert torch.get_default_dtype() is torch.float32


def test_the_weights_are_those_of_the_files(net: Path, net_entry: ModelEntry) -> None:
    loaded = load_net(net_entry, CPU, torch.float32).net.state_dict()
    for name, tensor in load_file(net / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(loaded[name], tensor)


def test_a_missing_weight_is_an_error_and_not_a_random_number(catalog: Catalog, net: Path) -> None:
    file = net / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    entry = publish(catalog, ModelSource(id="edges", path=net))
    with pytest.raises(ModelLoadFailed, match=r"'edges'.*conv_in\.weight"):
        load_net(entry, CPU, torch.float32)


def test_a_missing_weight_of_the_text_encoder_too(catalog: Catalog, base: Path) -> None:
    file = base / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if "final_layer_norm" not in name}, file)
    entry = publish(catalog, ModelSource(id="dream", path=base))
    with pytest.raises(ModelLoadFailed, match=r"'dream'.*final_layer_norm"):
        load_base(entry, CPU, torch.float32)


def test_files_that_changed_since_are_not_taken_for_the_model(base: Path, base_entry: ModelEntry) -> None:
    config = base / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 123456}))
    with pytest.raises(ModelLoadFailed, match=r"'dream'.*changed after it was published.*publish it again"):
        load_base(base_entry, CPU, torch.float32)


def test_another_family_in_the_folder_is_refused(base_entry: ModelEntry) -> None:
    build_tiny_base(Path(base_entry.location), cross_attention_dim=32)
    with pytest.raises(FamilyMismatch, match=r"'dream'.*custom16.*custom32"):
        load_base(base_entry, CPU, torch.float32)


def test_a_folder_that_turned_bad_is_refused(net: Path, net_entry: ModelEntry) -> None:
    (net / "surprise.py").touch()
    with pytest.raises(UnsafeModel, match=r"'edges'.*surprise\.py"):
        load_net(net_entry, CPU, torch.float32)


def test_a_folder_that_is_gone_is_named(base_entry: ModelEntry) -> None:
    lost = base_entry.model_copy(update={"location": "/nowhere/dream"})
    with pytest.raises(ModelLoadFailed, match=r"'dream'.*/nowhere/dream: no such folder"):
        load_base(lost, CPU, torch.float32)


def test_a_net_is_no_base_model(net_entry: ModelEntry) -> None:
    with pytest.raises(ModelLoadFailed, match="of type controlnet, not base"):
        load_base(net_entry, CPU, torch.float32)


def test_a_configuration_the_library_cannot_build_names_the_model(catalog: Catalog, net: Path) -> None:
    config = net / "config.json"
    config.write_text(config.read_text().replace('"DownBlock2D"', '"SidewaysBlock2D"'))
    entry = publish(catalog, ModelSource(id="edges", path=net))
    with pytest.raises(ModelLoadFailed, match=r"'edges'.*SidewaysBlock2D"):
        load_net(entry, CPU, torch.float32)


def rename_weights(file: Path, *changes: tuple[str, str], prefix: str = "") -> None:
    weights = load_file(file)
    renamed = {}
    for name, tensor in weights.items():
        for old, new in changes:
            name = name.replace(old, new)  # noqa: PLW2901  - one change after the other
        renamed[prefix + name] = tensor
    save_file(renamed, file, {"format": "pt"})


def test_weights_under_the_names_that_sd15_was_published_with_are_found(catalog: Catalog, base: Path) -> None:
    """Its VAE names attention as old diffusers did, its text encoder nests everything in ``text_model``."""
    expected = load_base(publish(catalog, ModelSource(id="new", path=base)), CPU, torch.float32)
    rename_weights(
        base / "vae" / "diffusion_pytorch_model.safetensors",
        ("to_q.", "query."),
        ("to_k.", "key."),
        ("to_v.", "value."),
        ("to_out.0.", "proj_attn."),
    )
    rename_weights(base / "text_encoder" / "model.safetensors", prefix="text_model.")
    loaded = load_base(publish(catalog, ModelSource(id="old", path=base)), CPU, torch.float32)
    for old, new in ((loaded.vae, expected.vae), (loaded.text_encoder, expected.text_encoder)):
        weights = new.state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in old.state_dict().items())
