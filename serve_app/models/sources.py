"""From a path that the operator names to a verified model folder in diffusers layout.

Nothing is loaded here, and torch is not needed: the layout, the classes it names, the headers of its weights and where
its links lead are checked, so that what is listed can be loaded and can't run code. What is refused is never repaired.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from serve_app.errors import FamilyMismatch, ModelLoadFailed, RetryableError, UnsafeModel, one_of
from serve_app.models.catalog import ModelType
from serve_app.models.folders import HALF, ModelFolder
from serve_app.schedulers import SCHEDULERS

_FAMILY_OF_WIDTH: Mapping[int, str] = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Width of the text embeddings that the cross-attention reads."""

_TASKS = ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint")
_PIPELINES = frozenset(f"StableDiffusion{task}Pipeline" for task in _TASKS)
_XL_PIPELINES = frozenset(
    f"StableDiffusionXL{task}Pipeline"
    for task in (*_TASKS, "ControlNetUnion", "ControlNetUnionImg2Img", "ControlNetUnionInpaint")
)
_TOKENIZERS = frozenset({"transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"})
_LOADED: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"diffusers.UNet2DConditionModel"}),
    "vae": frozenset({"diffusers.AutoencoderKL"}),
    "text_encoder": frozenset({"transformers.CLIPTextModel"}),
    "tokenizer": _TOKENIZERS,
    "scheduler": frozenset(f"diffusers.{name}" for name in (*SCHEDULERS, "TCDScheduler")),
}
"""Parts of a base model, and the classes each may be of.

Of a scheduler nothing but its configuration is read, which all of these classes share. Others (EDM, flow matching) come
with models that predict something else, and would be driven wrongly.
"""
_LOADED_XL: Mapping[str, frozenset[str]] = {
    **_LOADED,
    "text_encoder_2": frozenset({"transformers.CLIPTextModelWithProjection"}),
    "tokenizer_2": _TOKENIZERS,
}
_NOT_LOADED: Mapping[str, frozenset[str]] = {
    "safety_checker": frozenset({"stable_diffusion.StableDiffusionSafetyChecker"}),
    "feature_extractor": frozenset({"transformers.CLIPImageProcessor", "transformers.CLIPFeatureExtractor"}),
    "image_encoder": frozenset({"transformers.CLIPVisionModelWithProjection"}),
    "controlnet": frozenset({"diffusers.ControlNetModel", "diffusers.ControlNetUnionModel"}),
}
"""Parts that published models carry and that this server leaves on the disk."""
_WEIGHTS_STEM: Mapping[str, str] = {
    ".": "diffusion_pytorch_model",  # a ControlNet
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_CONTROLNETS = ("ControlNetModel", "ControlNetUnionModel")
INPAINT_CHANNELS = 9
"""Four of the latent, one of the mask, four of the masked image."""
_UNION_TYPES = 6
"""diffusers' default of ``num_control_type``."""
_CONFIG_FILE: Mapping[str, str] = {
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_REVISION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]*")


@dataclass(frozen=True, slots=True)
class ResolvedSource:
    """A folder that passed every check."""

    folder: Path
    """Absolute; for a hub cache, the snapshot."""
    type: ModelType
    config: Mapping[str, object]
    """Of the UNet or of the ControlNet."""
    files: tuple[str, ...]
    """What loading reads: weights and configuration, relative to ``folder``, sorted."""
    parts: tuple[str, ...] = ()
    """Of a base model: the subfolders that are loaded."""
    max_clip_skip: int | None = None
    """Of a base model: how many layers of its text encoders can be skipped."""
    zero_empty_negative: bool = False
    """Of a base model: an empty negative prompt means embeddings of zeros (``force_zeros_for_empty_prompt``)."""

    @property
    def inpaints(self) -> bool | None:
        """Of a base model, whether its UNet takes mask and masked image beside the latent."""
        return None if self.type is not ModelType.BASE else self.config.get("in_channels") == INPAINT_CHANNELS

    @property
    def union_types(self) -> int | None:
        """Of a ControlNet-Union, how many control types it knows; None for every other model.

        Known by its configuration, for repackaged ones call themselves ControlNetModel.
        """
        count = self.config.get("num_control_type")
        if count is None and self.config.get("_class_name") == "ControlNetUnionModel":
            return _UNION_TYPES
        return count if isinstance(count, int) else None

    def variant(self, part: str) -> str | None:
        """``fp16`` where the weights of ``part`` are there in half precision only, as the libraries call it."""
        start = _WEIGHTS_STEM[part] if part == "." else f"{part}/{_WEIGHTS_STEM[part]}"
        weights = [name for name in self.files if name.startswith(start) and name.endswith(".safetensors")]
        return HALF if all(f".{HALF}" in name for name in weights) else None

    @property
    def size_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)

    @property
    def changed_at(self) -> float:
        """When a file was last written, renamed or linked anew, in seconds since the epoch by the disk's clock.

        By ``st_ctime`` too: tools that copy files keep their ``st_mtime``.
        """
        paths = [self.folder / name for name in self.files]
        stats = [stat for path in paths for stat in (path.stat(), path.lstat())]
        return max(max(stat.st_mtime, stat.st_ctime) for stat in stats)

    def hash(self) -> str:
        """SHA-256 over the sorted pairs (relative path, SHA-256 of the file), hex. Reads every byte."""
        total = hashlib.sha256()
        for name in self.files:
            with (self.folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{name}\0{digest}\n".encode())
        return total.hexdigest()


def resolve(path: Path) -> ResolvedSource:
    """Find and verify the model at ``path``: a folder in diffusers layout, or a repository folder of a hub cache.

    Raises:
        ModelLoadFailed: it isn't there, isn't a model of a kind that is served, or files are missing or cut short.
        UnsafeModel: weights only as pickles, code, classes that are not on the list, or links that lead out.
        RetryableError: the disk gave an error instead of an answer, as network disks do; it says nothing of the model.
    """
    try:
        return _resolve(path)
    except OSError as error:
        raise RetryableError(f"{path} cannot be read now: {error}") from error


def _resolve(path: Path) -> ResolvedSource:
    folder, roots = _locate(path)
    model = ModelFolder(folder, roots)
    model.refuse_code()
    if model.has("model_index.json"):
        return _base(model)
    if model.has("config.json") and model.json("config.json").get("_class_name") in _CONTROLNETS:
        files = model.part(".", "config.json", _WEIGHTS_STEM["."])
        return ResolvedSource(folder, ModelType.CONTROLNET, model.json("config.json"), tuple(sorted(set(files))))
    pickles = model.pickles(".")
    if pickles:
        raise UnsafeModel(f"{path}: only pickled weights ({', '.join(pickles)}); allowed: safetensors")
    raise ModelLoadFailed(
        f"{path} is not a model that can be served. Allowed: a folder with model_index.json (base model) or with a "
        f"config.json of class {' or '.join(_CONTROLNETS)}, or a hub cache folder models--owner--name that holds one"
    )


def detect_family(config: Mapping[str, object]) -> str:
    """The base family that a UNet's or ControlNet's configuration belongs to, by the width of its text embeddings.

    SDXL's also take the pooled text and the sizes (``text_time``), which no other known family does.
    """
    width = _width(config)
    found = _FAMILY_OF_WIDTH.get(width)
    sized = config.get("addition_embed_type") == "text_time"
    return f"custom{width}" if found is None or sized is not (found == "sdxl") else found


def family_of(config: Mapping[str, object], named: str | None) -> str:
    """The family the operator named, else the detected one.

    A name of one's own is taken as it is: it parts models that look alike from outside.

    Raises:
        FamilyMismatch: the name is that of a known family (or custom<width>) and the weights are of another width.
    """
    found = detect_family(config)
    if named is None or named == found:
        return found
    if named in _FAMILY_OF_WIDTH.values() or re.fullmatch(r"custom\d+", named):
        raise FamilyMismatch(
            f"The model is named as of the family {named!r}, but its cross_attention_dim is {_width(config)}: {found!r}"
        )
    return named


def _width(config: Mapping[str, object]) -> int:
    width = config.get("cross_attention_dim")
    widths = width if isinstance(width, list) else [width]
    if not widths or not isinstance(widths[0], int) or any(other != widths[0] for other in widths):
        raise ModelLoadFailed(f"cross_attention_dim must be one whole number, got {width!r}")
    return widths[0]


def _locate(path: Path) -> tuple[Path, tuple[Path, ...]]:
    """The folder of the model, and the folders in which its files may really be."""
    if not path.is_dir():
        raise ModelLoadFailed(f"{path}: no such folder")
    folder = path.resolve()
    if folder.name.startswith("models--"):
        reference = folder / "refs" / "main"
        if not reference.is_file():
            known = sorted(child.name for child in folder.glob("snapshots/*"))
            raise ModelLoadFailed(f"{path}: no refs/main; name one of its snapshots: {', '.join(known) or 'none'}")
        revision = reference.read_text().strip()
        if not _REVISION.fullmatch(revision):
            raise UnsafeModel(f"{reference}: {revision!r} is not a revision")
        folder = folder / "snapshots" / revision
        if folder.is_symlink() or not folder.is_dir():
            raise ModelLoadFailed(f"{folder}: no such snapshot; the download has not ended")
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return folder, (folder, parent.parent / "blobs")
    return folder, (folder,)


def _base(model: ModelFolder) -> ResolvedSource:
    index = model.json("model_index.json")
    where = model.path / "model_index.json"
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES | _XL_PIPELINES:
        raise UnsafeModel(f"{where}: {one_of('pipeline class', pipeline, sorted(_PIPELINES | _XL_PIPELINES))}")
    loaded = _LOADED_XL if pipeline in _XL_PIPELINES else _LOADED
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_"):
            _check_class(where, loaded, name, value)
    missing = [name for name in loaded if index.get(name) in (None, [None, None])]
    if pipeline in _XL_PIPELINES and (index.get("requires_aesthetics_score") or "text_encoder" in missing):
        raise ModelLoadFailed(f"{where}: this is a refiner of SDXL; allowed: base and inpainting models")
    if missing:
        raise ModelLoadFailed(f"{model.path}: model_index.json has no {', '.join(missing)}")
    files = {"model_index.json"}
    for name in loaded:
        files.update(model.part(name, _CONFIG_FILE.get(name, "config.json"), _WEIGHTS_STEM.get(name)))
        if name.startswith("tokenizer"):
            _check_vocabulary(model, name, files)
    return ResolvedSource(
        model.path,
        ModelType.BASE,
        model.json("unet/config.json"),
        tuple(sorted(files)),
        tuple(name for name in loaded if name in _WEIGHTS_STEM),
        _max_clip_skip(model, loaded),
        # The pipelines of SDXL take it for true where it is not named; the others know no such thing.
        pipeline in _XL_PIPELINES and bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _check_vocabulary(model: ModelFolder, name: str, files: AbstractSet[str]) -> None:
    if f"{name}/tokenizer.json" not in files and not {f"{name}/vocab.json", f"{name}/merges.txt"} <= files:
        raise ModelLoadFailed(f"{model.path / name}: neither tokenizer.json nor vocab.json and merges.txt")


def _max_clip_skip(model: ModelFolder, loaded: Iterable[str]) -> int:
    """All layers of SD's encoder may be skipped; SDXL reads the layer before the last, so one less of each."""
    counts = []
    for name in loaded:
        if not name.startswith("text_encoder"):
            continue
        layers = model.json(f"{name}/config.json").get("num_hidden_layers", 12)
        if not isinstance(layers, int):
            raise ModelLoadFailed(f"{model.path / name}: num_hidden_layers must be a whole number, got {layers!r}")
        counts.append(layers)
    return min(counts) - (len(counts) - 1)


def _check_class(where: Path, loaded: Mapping[str, frozenset[str]], name: str, value: list[object]) -> None:
    if value == [None, None]:
        return
    allowed = loaded.get(name) or _NOT_LOADED.get(name)
    label = ".".join(str(part) for part in value)
    if allowed is None:
        raise UnsafeModel(f"{where}: {one_of('component', name, [*loaded, *_NOT_LOADED])} It would be a {label}.")
    if label not in allowed:
        raise UnsafeModel(f"{where}: {one_of(f'class of {name}', label, sorted(allowed))}")
