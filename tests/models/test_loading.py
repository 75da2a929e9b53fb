import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import ModelSource
from serve_app.errors import (
    FamilyMismatch,
    ModelLoadFailed,
    OutOfMemory,
    RetryableError,
    ServeError,
    UnsafeModel,
    WorkerLost,
)
from serve_app.models.catalog import Catalog, ModelEntry, ModelType
from serve_app.models.loading import _guarded, load_base, load_net
from serve_app.models.publish import publish
from serve_app.models.sources import ResolvedSource, resolve
from support.built import build_base

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
    build_base(Path(base_entry.location), cross_attention_dim=32)
    with pytest.raises(FamilyMismatch, match=r"'dream'.*custom16.*custom32"):
        load_base(base_entry, CPU, torch.float32)


def test_a_folder_that_turned_bad_is_refused(net: Path, net_entry: ModelEntry) -> None:
    (net / "surprise.py").touch()
    with pytest.raises(UnsafeModel, match=r"'edges'.*surprise\.py"):
        load_net(net_entry, CPU, torch.float32)


def test_a_folder_that_is_gone_may_be_a_share_that_is_not_mounted(base_entry: ModelEntry) -> None:
    lost = base_entry.model_copy(update={"location": "/nowhere/dream"})
    with pytest.raises(RetryableError, match=r"'dream'.*/nowhere/dream: no such folder on this node"):
        load_base(lost, CPU, torch.float32)


def test_a_file_that_is_gone_from_its_folder_fails_for_good(base: Path, base_entry: ModelEntry) -> None:
    (base / "unet" / "config.json").unlink()
    with pytest.raises(ModelLoadFailed, match=r"'dream'.*missing, the model is incomplete"):
        load_base(base_entry, CPU, torch.float32)


@contextmanager
def no_more_files() -> Iterator[None]:
    """Opening anything fails with EMFILE: a disk that gives errors, without a disk."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_disk_that_gives_errors_is_nobodys_fault(base_entry: ModelEntry) -> None:
    with no_more_files(), pytest.raises(RetryableError, match=r"'dream'.*cannot be read now") as loading:
        load_base(base_entry, CPU, torch.float32)
    assert type(loading.value) is RetryableError
    with no_more_files(), pytest.raises(RetryableError, match="cannot be read now"):
        resolve(Path(base_entry.location))
    assert load_base(base_entry, CPU, torch.float32).id == "dream"


def wrapped(cause: OSError) -> OSError:
    """As the libraries do it: an error without a number, raised from the system's."""
    error = OSError("cannot load the checkpoint")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("no file named config.json"), ModelLoadFailed),
        (wrapped(FileNotFoundError(errno.ENOENT, "gone")), ModelLoadFailed),
        (wrapped(OSError(errno.ESTALE, "stale file handle")), RetryableError),
        (OSError(errno.EIO, "input/output error"), RetryableError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), WorkerLost),
        (torch.AcceleratorError("CUDA error: out of memory"), OutOfMemory),
        (torch.OutOfMemoryError("no room"), OutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), OutOfMemory),
        (RuntimeError("size mismatch for conv_in"), ModelLoadFailed),
    ],
)
def test_errors_while_loading_mean(error: Exception, expected: type[ServeError], base_entry: ModelEntry) -> None:
    def build(_: ResolvedSource) -> None:
        raise error

    with pytest.raises(expected, match="'dream'") as loading:
        _guarded(base_entry, ModelType.BASE, build)
    assert type(loading.value) is expected


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
