"""SD 2, SDXL and ControlNet-Union from the folder into memory, in every layout in which they are published."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetUnionModel
from torch import nn

from serve_app.config import AppConfig, ModelSource
from serve_app.errors import ConfigError, FamilyMismatch, ModelLoadFailed, UnsafeModel
from serve_app.models.catalog import Catalog, ModelType
from serve_app.models.components import BaseComponents
from serve_app.models.loading import load_base, load_net
from serve_app.models.publish import publish, publish_all
from serve_app.models.sources import resolve
from support.folders import as_hub_cache, edit_json, save_base, save_net
from support.tiny import Zoo, tiny_zoo

CPU = torch.device("cpu")
HALF_UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return tiny_zoo()


def halved(base: BaseComponents) -> BaseComponents:
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return replace(base, **{name: copy.deepcopy(getattr(base, name)).half() for name in names})


@pytest.fixture(scope="module")
def saved(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_base(zoo.families["sd2"], folder / "sd2")
    save_base(zoo.families["xl"], folder / "xl")
    save_base(halved(zoo.families["xl"]), folder / "half", variant="fp16")
    save_base(zoo.families["xl-inpaint"], folder / "xl-inpaint", task="Inpaint")
    for name in ("xl-canny", "xl-union", "xl-promax"):
        save_net(zoo.nets[name], folder / name)
    save_net(zoo.nets["xl-union"], folder / "half-union", variant="fp16")
    return folder


@pytest.fixture
def xl(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "xl", tmp_path / "xl"))


def loaded(catalog: Catalog, folder: Path) -> BaseComponents:
    return load_base(publish(catalog, ModelSource(id="dream", path=folder)), CPU, torch.float32)


def modules(base: BaseComponents) -> list[nn.Module]:
    return [base.unet, base.vae, *(encoder for _, encoder in base.text_encoders)]


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    weights = other.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("name", ["sd2", "xl", "xl-inpaint"])
def test_a_base_comes_back_as_it_was_saved(name: str, catalog: Catalog, saved: Path, zoo: Zoo) -> None:
    expected = zoo.families[name]
    entry = publish(catalog, ModelSource(id="dream", path=saved / name))
    base = load_base(entry, CPU, torch.float32)
    assert (entry.type, entry.max_clip_skip) == (ModelType.BASE, expected.max_clip_skip)
    assert entry.inpaints == (name == "xl-inpaint")
    assert base.zero_empty_negative is expected.zero_empty_negative
    assert len(base.text_encoders) == len(expected.text_encoders)
    for one, other in zip(modules(base), modules(expected), strict=True):
        assert type(one) is type(other)
        assert_same_weights(one, other)
    for (tokenizer, _), (other_tokenizer, _) in zip(base.text_encoders, expected.text_encoders, strict=True):
        assert tokenizer.pad_token_id == other_tokenizer.pad_token_id
        assert tokenizer("a fox").input_ids == other_tokenizer("a fox").input_ids
    assert (
        0 <= base.size_bytes - sum(each.nbytes for module in modules(base) for each in module.parameters()) <= 2 * 616
    )
    prediction = expected.scheduler_config.get("prediction_type", "epsilon")
    assert base.scheduler_config["prediction_type"] == prediction


def test_every_part_of_sdxl_counts(saved: Path) -> None:
    found = resolve(saved / "xl")
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    assert {name.partition("/")[0] for name in found.files} == {"model_index.json", *parts}


@pytest.mark.parametrize("name", ["xl", "xl-promax"])
def test_hub_caches_hold_the_same_models(name: str, saved: Path, tmp_path: Path, catalog: Catalog) -> None:
    cached = resolve(as_hub_cache(saved / name, tmp_path))
    assert cached.hash() == resolve(saved / name).hash()
    entry = publish(catalog, ModelSource(id="one", path=cached.folder))
    load_base(entry, CPU, torch.float32) if name == "xl" else load_net(entry, CPU, torch.float32)


def test_a_vocabulary_in_the_old_layout_keeps_its_padding(xl: Path, zoo: Zoo, catalog: Catalog) -> None:
    """As SDXL was published: vocab.json and merges.txt, and "!" fills up the second encoder's prompts."""
    (xl / "tokenizer_2" / "tokenizer.json").unlink()
    tokenizer = zoo.families["xl"].tokenizer_2
    assert tokenizer is not None
    (xl / "tokenizer_2" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (xl / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!", "add_prefix_space": False}
    (xl / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(config))
    read = loaded(catalog, xl).tokenizer_2
    assert read is not None
    for prompt in ("a fox", "!", "no (brackets)"):
        wanted, found = (each(prompt, padding="max_length", max_length=77).input_ids for each in (tokenizer, read))
        assert wanted == found


@pytest.mark.parametrize(("named", "expected"), [(True, True), (False, False), (None, True)])
def test_what_an_empty_negative_prompt_means_is_read_from_the_index(
    named: bool | None, expected: bool, xl: Path
) -> None:
    """diffusers' default is true."""
    edit_json(xl / "model_index.json", force_zeros_for_empty_prompt=named)
    assert resolve(xl).zero_empty_negative is expected


def test_half_precision_is_read_where_there_is_no_other(saved: Path, catalog: Catalog, zoo: Zoo) -> None:
    found = resolve(saved / "half")
    weights = [name for name in found.files if name.endswith(".safetensors")]
    assert len(weights) == 4
    assert all(".fp16." in name for name in weights)
    halves = modules(halved(zoo.families["xl"]))
    for one, half in zip(modules(loaded(catalog, saved / "half")), halves, strict=True):
        assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
        assert_same_weights(one, half.float())
    net = load_net(publish(catalog, ModelSource(id="net", path=saved / "half-union")), CPU, torch.float32)
    assert net.union


def test_full_precision_is_read_where_there_are_both(xl: Path, saved: Path) -> None:
    before = resolve(xl)
    shutil.copyfile(saved / "half" / HALF_UNET, xl / HALF_UNET)
    assert resolve(xl) == before
    assert resolve(xl).hash() == before.hash()


def test_parts_may_differ_in_precision(xl: Path, saved: Path, catalog: Catalog, zoo: Zoo) -> None:
    shutil.copyfile(saved / "half" / HALF_UNET, xl / HALF_UNET)
    (xl / UNET).unlink()
    found = resolve(xl)
    assert (found.variant("unet"), found.variant("vae")) == ("fp16", None)
    base = loaded(catalog, xl)
    assert_same_weights(base.vae, zoo.families["xl"].vae)


def test_half_precision_in_shards(zoo: Zoo, tmp_path: Path, catalog: Catalog) -> None:
    folder = save_base(zoo.families["xl"], tmp_path / "shards", variant="fp16", max_shard_size="40KB")
    names = [name for name in resolve(folder).files if name.startswith("unet/")]
    assert "unet/diffusion_pytorch_model.safetensors.index.fp16.json" in names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    loaded(catalog, folder)
    next((folder / "text_encoder_2").glob("*.safetensors")).unlink()
    with pytest.raises(ModelLoadFailed, match="missing"):
        resolve(folder)


def aesthetic(model: Path) -> None:
    edit_json(model / "model_index.json", requires_aesthetics_score=True)


def one_encoder(model: Path) -> None:
    """As the published refiner: its first encoder is null."""
    index = json.loads((model / "model_index.json").read_text())
    nulls = {"text_encoder": [None, None], "tokenizer": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index | nulls))


@pytest.mark.parametrize("refine", [aesthetic, one_encoder])
def test_a_refiner_is_refused(refine: Callable[[Path], None], xl: Path) -> None:
    edit_json(xl / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    resolve(xl)  # a base may call itself so
    refine(xl)
    with pytest.raises(ModelLoadFailed, match="a refiner of SDXL; allowed: base and inpainting models"):
        resolve(xl)


def test_the_second_encoder_is_held_to_the_same_rules(xl: Path) -> None:
    weights = xl / "text_encoder_2" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UnsafeModel, match="text_encoder_2: only pickled weights"):
        resolve(xl)
    weights.with_name("pytorch_model.bin").rename(weights)
    edit_json(xl / "model_index.json", text_encoder_2=["transformers", "T5EncoderModel"])
    with pytest.raises(UnsafeModel, match=r"T5EncoderModel.*Allowed: transformers.CLIPTextModelWithProjection"):
        resolve(xl)
    edit_json(xl / "model_index.json", text_encoder_2=None)
    with pytest.raises(ModelLoadFailed, match=r"model_index\.json has no text_encoder_2"):
        resolve(xl)


def test_a_second_encoder_needs_sdxl(saved: Path, tmp_path: Path) -> None:
    """An SD pipeline would leave it unused, and the UNet without half of its text."""
    folder = Path(shutil.copytree(saved / "xl", tmp_path / "xl"))
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(UnsafeModel, match="'text_encoder_2' is unknown"):
        resolve(folder)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "DPMSolverMultistepScheduler"])
def test_schedulers_that_share_the_configuration_are_fine(name: str, xl: Path) -> None:
    edit_json(xl / "model_index.json", scheduler=["diffusers", name])
    resolve(xl)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_schedulers_of_other_predictions_are_refused(name: str, xl: Path) -> None:
    edit_json(xl / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(UnsafeModel, match=f"{name}.*Allowed: .*EulerDiscreteScheduler"):
        resolve(xl)


@pytest.mark.parametrize(("name", "types"), [("xl-union", 6), ("xl-promax", 8)])
def test_a_union_net_is_known_by_its_files(name: str, types: int, catalog: Catalog, saved: Path, zoo: Zoo) -> None:
    entry = publish(catalog, ModelSource(id="net", path=saved / name))
    assert (entry.type, entry.control_type, entry.union_types) == (ModelType.CONTROLNET, "union", types)
    assert {"canny", "depth", "openpose"} <= set(entry.control_types)
    assert ("tile" in entry.control_types) is (types == 8)
    assert "shuffle" not in entry.control_types
    net = load_net(entry, CPU, torch.float32)
    assert isinstance(net.net, ControlNetUnionModel)
    assert net.union
    assert_same_weights(net.net, zoo.nets[name].net)


def test_a_union_net_that_calls_itself_a_controlnet(catalog: Catalog, saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved / "xl-union", tmp_path / "net"))
    edit_json(folder / "config.json", _class_name="ControlNetModel")
    entry = publish(catalog, ModelSource(id="net", path=folder))
    assert entry.union_types == 6
    assert load_net(entry, CPU, torch.float32).union


def test_the_control_type_of_a_union_net_is_not_a_choice(catalog: Catalog, saved: Path) -> None:
    publish(catalog, ModelSource(id="net", path=saved / "xl-union", control_type="union"))
    with pytest.raises(ConfigError, match="'net' is a ControlNet-Union and answers to canny, depth"):
        publish(catalog, ModelSource(id="net", path=saved / "xl-union", control_type="canny"))
    with pytest.raises(ConfigError, match=r"'union' is unknown\. Allowed: canny"):
        publish(catalog, ModelSource(id="other", path=saved / "xl-canny", control_type="union"))


def test_a_dedicated_net_goes_before_a_union_net(catalog: Catalog, saved: Path) -> None:
    for name in ("xl-union", "xl-promax"):
        publish(catalog, ModelSource(id=name, path=saved / name, family="mine"))
    publish(catalog, ModelSource(id="xl-canny", path=saved / "xl-canny", family="mine", control_type="canny"))

    def means(control_type: str) -> str | None:
        found = catalog.net_for(control_type, "mine")
        return None if found is None else found.id

    assert [means(each) for each in ("canny", "depth", "tile", "shuffle")] == [
        "xl-canny",
        "xl-union",
        "xl-promax",
        None,
    ]
    assert catalog.net_for("depth", "sdxl") is None


def test_sdxl_under_the_name_of_another_family_is_refused(catalog: Catalog, saved: Path, xl: Path) -> None:
    for name in ("xl", "xl-union"):
        with pytest.raises(FamilyMismatch, match="'sd15', but its cross_attention_dim is 40"):
            publish(catalog, ModelSource(id="dream", path=saved / name, family="sd15"))
    edit_json(xl / "unet" / "config.json", cross_attention_dim=2048)
    with pytest.raises(FamilyMismatch, match="'sd21', but its cross_attention_dim is 2048: 'sdxl'"):
        publish(catalog, ModelSource(id="dream", path=xl, family="sd21"))


def test_what_a_row_lacks_is_found_out_at_the_next_start(catalog: Catalog, saved: Path, tmp_path: Path) -> None:
    """Rows that an older version wrote know neither."""
    source = ModelSource(id="net", path=saved / "xl-promax")
    config = AppConfig(data=tmp_path / "data", demo_model=False, models=(source,))
    (entry,) = publish_all(config, catalog)
    catalog.add(entry.model_copy(update={"union_types": None, "control_type": None}))
    assert publish_all(config, catalog) == (entry,)
