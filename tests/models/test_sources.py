import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.errors import FamilyMismatch, ModelError, ModelLoadFailed, UnsafeModel
from serve_app.models.catalog import ModelType
from serve_app.models.sources import detect_family, family_of, resolve
from support.folders import REVISION, as_hub_cache, edit_json


def test_a_base_model_is_found(base: Path) -> None:
    found = resolve(base)
    assert found.type is ModelType.BASE
    assert found.folder == base.resolve()
    assert {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(found.files)
    assert {"text_encoder/model.safetensors", "scheduler/scheduler_config.json"} <= set(found.files)
    assert found.size_bytes == sum((base / name).stat().st_size for name in found.files)


def test_a_controlnet_is_found(net: Path) -> None:
    found = resolve(net)
    assert found.type is ModelType.CONTROLNET
    assert found.files == ("config.json", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("which", ["base", "net"])
def test_a_hub_cache_is_the_same_model(which: str, built: Path, tmp_path: Path) -> None:
    plain = resolve(built / which)
    repository = as_hub_cache(built / which, tmp_path)
    cached = resolve(repository)
    assert cached.folder == (repository / "snapshots" / REVISION).resolve()
    assert resolve(cached.folder) == cached
    assert (cached.files, cached.size_bytes, cached.hash()) == (plain.files, plain.size_bytes, plain.hash())


def test_a_net_in_a_subfolder_of_a_snapshot(net: Path, tmp_path: Path) -> None:
    inner = tmp_path / "repository" / "diffusion_sd15"
    inner.parent.mkdir()
    net.rename(inner)
    repository = as_hub_cache(inner.parent, tmp_path)
    assert resolve(repository / "snapshots" / REVISION / "diffusion_sd15").type is ModelType.CONTROLNET


def test_shards_count_as_one_model(net: Path) -> None:
    whole = net / "diffusion_pytorch_model.safetensors"
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in names:
        shutil.copyfile(whole, net / name)
    whole.unlink()
    index = net / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}))
    assert set(names) < set(resolve(net).files)
    (net / names[1]).unlink()
    with pytest.raises(ModelLoadFailed, match=r"00002-of-00002.*missing"):
        resolve(net)


def test_the_hash_is_of_weights_and_configuration_only(base: Path) -> None:
    before = resolve(base).hash()
    (base / "README.md").write_text("words")
    (base / "model.ckpt").write_bytes(b"left on the disk")
    assert resolve(base).hash() == before
    edit_json(base / "vae" / "config.json", scaling_factor=0.5)
    assert resolve(base).hash() != before


def test_one_changed_weight_changes_the_hash(net: Path) -> None:
    before = resolve(net).hash()
    weights = net / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert resolve(net).hash() != before


def swap_weights(model: Path, part: str, stem: str, name: str) -> None:
    (model / part / f"{stem}.safetensors").unlink()
    (model / part / name).write_bytes(b"\x80\x04")


def pickled_unet(model: Path) -> None:
    swap_weights(model, "unet", "diffusion_pytorch_model", "diffusion_pytorch_model.bin")


def pickled_text_encoder(model: Path) -> None:
    swap_weights(model, "text_encoder", "model", "pytorch_model.bin")


def code(model: Path) -> None:
    (model / "unet" / "my_unet.py").write_text("print('hello')")


def code_at_the_top(model: Path) -> None:
    (model / "pipeline.PY").write_text("print('hello')")


def auto_map(model: Path) -> None:
    edit_json(model / "text_encoder" / "config.json", auto_map={"AutoModel": "my.Model"})


def tokenizer_auto_map(model: Path) -> None:
    edit_json(model / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "my.Tokenizer"})


def other_file(model: Path) -> None:
    edit_json(model / "text_encoder" / "config.json", transformers_weights="adapter_model.bin")


def custom_class(model: Path) -> None:
    edit_json(model / "model_index.json", unet=["my_unet", "MyUNet"])


def custom_pipeline(model: Path) -> None:
    edit_json(model / "model_index.json", _class_name=["pipeline", "MyPipeline"])


def unknown_component(model: Path) -> None:
    edit_json(model / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])


def link_out(model: Path) -> None:
    secret = model.parent / "elsewhere.json"
    secret.write_text("{}")
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "scheduler" / "scheduler_config.json").symlink_to(secret)


def folder_link_out(model: Path) -> None:
    (model / "vae").rename(model.parent / "vae")
    (model / "vae").symlink_to(model.parent / "vae")


def shard_out(model: Path) -> None:
    (model.parent / "evil.safetensors").write_bytes(b"")
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../evil.safetensors"}}))


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (pickled_unet, "unet: only pickled weights .diffusion_pytorch_model.bin."),
        (pickled_text_encoder, "text_encoder: only pickled weights .pytorch_model.bin."),
        (code, "my_unet.py"),
        (code_at_the_top, "pipeline.PY"),
        (auto_map, "text_encoder/config.json: auto_map"),
        (tokenizer_auto_map, "tokenizer_config.json: auto_map"),
        (other_file, "text_encoder/config.json: transformers_weights makes transformers read another file"),
        (custom_class, "my_unet.MyUNet.*Allowed: diffusers.UNet2DConditionModel"),
        (custom_pipeline, "MyPipeline.*Allowed: .*StableDiffusionPipeline"),
        (unknown_component, "text_encoder_2.*Allowed: unet, vae"),
        (link_out, "scheduler_config.json: leads out of the model"),
        (folder_link_out, "vae: folders may not be links"),
        (shard_out, "evil.safetensors"),
    ],
)
def test_unsafe_base_models_are_refused(harm: Callable[[Path], None], named: str, base: Path) -> None:
    harm(base)
    with pytest.raises(UnsafeModel, match=named):
        resolve(base)


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v1-5.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeModel, match=r"v1-5.ckpt"):
        resolve(tmp_path)


def test_a_hub_link_out_of_the_blobs_is_refused(built: Path, tmp_path: Path) -> None:
    repository = as_hub_cache(built / "net", tmp_path)
    link = repository / "snapshots" / REVISION / "config.json"
    shutil.copyfile(link, tmp_path / "config.json")
    link.unlink()
    link.symlink_to("../../../config.json")
    with pytest.raises(UnsafeModel, match="leads out of the model"):
        resolve(repository)


@pytest.mark.parametrize("revision", ["../../net", "..", "/etc", ""])
def test_a_reference_that_is_no_revision_is_refused(revision: str, built: Path, tmp_path: Path) -> None:
    repository = as_hub_cache(built / "net", tmp_path)
    (repository / "refs" / "main").write_text(revision)
    with pytest.raises(UnsafeModel, match="not a revision"):
        resolve(repository)


def cut_weights(model: Path) -> None:
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def missing_weights(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def other_variant(model: Path) -> None:
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))


def no_part(model: Path) -> None:
    shutil.rmtree(model / "tokenizer")


def no_vocabulary(model: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink(missing_ok=True)


def part_not_named(model: Path) -> None:
    edit_json(model / "model_index.json", vae=None)


def half_a_configuration(model: Path) -> None:
    (model / "unet" / "config.json").write_text('{"cross_att')


def a_list_for_a_configuration(model: Path) -> None:
    (model / "unet" / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (cut_weights, "vae/diffusion_pytorch_model.safetensors.*damaged or incomplete"),
        (missing_weights, "vae: diffusion_pytorch_model.safetensors or .* is missing; found no weights"),
        (other_variant, "found diffusion_pytorch_model.non_ema.safetensors"),
        (no_part, "tokenizer/tokenizer_config.json: missing"),
        (no_vocabulary, "tokenizer: neither"),
        (part_not_named, "model_index.json has no vae"),
        (half_a_configuration, "unet/config.json"),
        (a_list_for_a_configuration, "unet/config.json: expected a JSON object"),
    ],
)
def test_half_written_models_are_refused(harm: Callable[[Path], None], named: str, base: Path) -> None:
    harm(base)
    with pytest.raises(ModelLoadFailed, match=named):
        resolve(base)


def test_half_downloaded_hub_models_are_refused(built: Path, tmp_path: Path) -> None:
    repository = as_hub_cache(built / "net", tmp_path)
    blob = (repository / "snapshots" / REVISION / "diffusion_pytorch_model.safetensors").resolve()
    blob.rename(blob.with_suffix(".incomplete"))
    with pytest.raises(ModelLoadFailed, match="missing, the model is incomplete"):
        resolve(repository)
    shutil.rmtree(repository / "snapshots")
    with pytest.raises(ModelLoadFailed, match="no such snapshot"):
        resolve(repository)
    (repository / "refs" / "main").unlink()
    with pytest.raises(ModelLoadFailed, match="no refs/main; name one of its snapshots: none"):
        resolve(repository)


def test_what_is_no_model_is_answered_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="no such folder"):
        resolve(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxControlNetModel"}')
    with pytest.raises(ModelLoadFailed, match=r"Allowed: a folder with model_index.json"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("width", "added", "family"),
    [
        (768, None, "sd15"),
        (1024, None, "sd21"),
        (2048, "text_time", "sdxl"),
        (2048, None, "custom2048"),
        (768, "text_time", "custom768"),
        (64, None, "custom64"),
        ([768, 768], None, "sd15"),
    ],
)
def test_the_family_is_read_from_width_and_conditions(width: object, added: str | None, family: str) -> None:
    assert detect_family({"cross_attention_dim": width, "addition_embed_type": added}) == family


@pytest.mark.parametrize("width", [None, "768", [768, 1024], []])
def test_a_width_that_is_none_is_refused(width: object) -> None:
    with pytest.raises(ModelLoadFailed, match="cross_attention_dim must be one whole number"):
        detect_family({"cross_attention_dim": width})


def test_an_own_name_of_a_family_wins() -> None:
    assert family_of({"cross_attention_dim": 768}, None) == "sd15"
    assert family_of({"cross_attention_dim": 768}, "sd15") == "sd15"
    assert family_of({"cross_attention_dim": 768}, "anime") == "anime"


@pytest.mark.parametrize("named", ["sd21", "sdxl", "custom64"])
def test_the_name_of_another_family_is_refused(named: str) -> None:
    with pytest.raises(FamilyMismatch, match=f"{named}.*768.*sd15") as caught:
        family_of({"cross_attention_dim": 768}, named)
    assert isinstance(caught.value, ModelError)
