"""From a catalogue entry to modules in memory: diffusers and transformers from a local folder, safetensors only.

Every load is checked against the catalogue: the same files, no parameter left to chance, the family that was promised.

What fails is told apart by whose fault it is. A folder that is damaged or lacks a file fails the job: another try would
end the same way. A disk that gives errors, or a folder that is not there at all, which is what a share that is not
mounted looks like, fails nobody: the job runs again, perhaps on another node, and the bound on attempts ends it.
"""

import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from serve_app.errors import ModelError, ModelLoadFailed, OutOfMemory, RetryableError, WorkerLost
from serve_app.models.building import ONE_AT_A_TIME
from serve_app.models.catalog import ModelEntry, ModelType
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.models.device_errors import is_out_of_memory
from serve_app.models.sources import ResolvedSource, family_of, resolve

T = TypeVar("T")

_CLASSES: Mapping[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}

_ANSWERS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors by which a disk that works says that a file is not there."""

diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


def load_base(entry: ModelEntry, device: torch.device, dtype: torch.dtype) -> BaseComponents:
    """Load a base model in eval mode, with gradients off.

    Raises:
        ModelLoadFailed: the folder is damaged, lacks files, or is not what was published.
        FamilyMismatch: its weights are of another family than the catalogue says.
        UnsafeModel: the folder was changed into one that would not be published.
        OutOfMemory: there is no room on ``device``.
        WorkerLost: ``device`` broke; nothing on it works from here on.
        RetryableError: the disk could not be read, or the folder is not there.
    """
    return _guarded(entry, ModelType.BASE, lambda source: _base(entry, source, device, dtype))


def load_net(entry: ModelEntry, device: torch.device, dtype: torch.dtype) -> NetComponents:
    """Load a ControlNet; otherwise as ``load_base``."""
    return _guarded(entry, ModelType.CONTROLNET, lambda source: _net(entry, source, device, dtype))


def _base(entry: ModelEntry, source: ResolvedSource, device: torch.device, dtype: torch.dtype) -> BaseComponents:
    modules = {part: _module(_CLASSES[part], source, part, device, dtype) for part in source.parts}
    tokenizers = {
        part: CLIPTokenizer.from_pretrained(source.folder / part, local_files_only=True)
        for part in ("tokenizer", "tokenizer_2")
        if part.replace("tokenizer", "text_encoder") in modules
    }
    return BaseComponents(
        id=entry.id,
        family=entry.family,
        hash=entry.hash,
        **modules,
        **tokenizers,
        # Every scheduler class reads the same file; which one runs is the request's choice.
        scheduler_config=DDIMScheduler.load_config(source.folder / "scheduler", local_files_only=True),
        device=device,
        dtype=dtype,
        size_bytes=sum(map(_size_bytes, modules.values())),
        zero_empty_negative=source.zero_empty_negative,
    )


def _net(entry: ModelEntry, source: ResolvedSource, device: torch.device, dtype: torch.dtype) -> NetComponents:
    kind = ControlNetModel if source.union_types is None else ControlNetUnionModel
    net = _module(kind, source, ".", device, dtype)
    return NetComponents(id=entry.id, family=entry.family, hash=entry.hash, net=net, size_bytes=_size_bytes(net))


def _guarded(entry: ModelEntry, wanted: ModelType, build: Callable[[ResolvedSource], T]) -> T:
    try:
        with ONE_AT_A_TIME:
            return build(_check(entry, wanted))
    except (ModelError, RetryableError) as error:
        raise type(error)(f"The model {entry.id!r}: {error.message}") from error
    except Exception as error:  # the libraries raise anything for a broken file
        raise _translated(entry, error) from error


def _translated(entry: ModelEntry, error: Exception) -> ModelLoadFailed | RetryableError:
    if is_out_of_memory(error):
        return OutOfMemory(f"No room on the accelerator for the model {entry.id!r}")
    if isinstance(error, torch.AcceleratorError):
        return WorkerLost(f"The accelerator broke while the model {entry.id!r} was loaded: {error}")
    what = f"The model {entry.id!r} could not be loaded from {entry.location}: {error}"
    return RetryableError(what) if any(map(_is_trouble, _chain(error))) else ModelLoadFailed(what)


def _is_trouble(error: BaseException) -> bool:
    """Whether a disk failed. The libraries raise OSError for broken models too, but without a system's error number."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _ANSWERS


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it was raised from: the libraries wrap what the disk said."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _check(entry: ModelEntry, wanted: ModelType) -> ResolvedSource:
    """Hold the folder against the catalogue. Its size stands for its hash here: hashing takes longer than loading."""
    folder = Path(entry.location)
    if not folder.is_dir():
        raise RetryableError(f"{folder}: no such folder on this node; the disk may not be mounted")
    source = resolve(folder)
    if source.type is not wanted or entry.type is not wanted:
        raise ModelLoadFailed(f"{entry.location} holds a model of type {source.type}, not {wanted}")
    family_of(source.config, entry.family)
    if source.size_bytes != entry.size_bytes:
        raise ModelLoadFailed(
            f"{entry.location} changed after it was published ({source.size_bytes} bytes, was {entry.size_bytes}); "
            "publish it again"
        )
    return source


def _module(kind: Any, source: ResolvedSource, part: str, device: torch.device, dtype: torch.dtype) -> Any:
    """One model, complete: a weight that is missing from the files would silently be random.

    Loaded in float32 and cast afterwards, for the libraries would else change torch's default dtype, which is global,
    under the running engine.
    """
    folder = source.folder / part
    module, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        variant=source.variant(part),
        local_files_only=True,
        output_loading_info=True,
        dtype=torch.float32,
    )
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        names = ", ".join(str(key) for key in lacking[:3])
        raise ModelLoadFailed(f"{folder}: {len(lacking)} weights are missing or of the wrong shape: {names} ...")
    # Diffusers' own `to` warns of modules that should stay in float32, and lists none.
    return nn.Module.to(module, device=device, dtype=dtype).eval().requires_grad_(False)


def _size_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
