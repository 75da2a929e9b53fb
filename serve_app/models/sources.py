"""From a path that the operator names to a verified model folder in diffusers layout.

Nothing is loaded here, and torch is not needed: the layout, the classes it names, the headers of its weights and where
its links lead are checked, so that what is listed can be loaded and can't run code. What is refused is never repaired.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open

from serve_app.errors import FamilyMismatch, ModelLoadFailed, RetryableError, UnsafeModel, one_of
from serve_app.models.catalog import ModelType
from serve_app.schedulers import SCHEDULERS

_FAMILY_OF_WIDTH: Mapping[int, str] = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
"""Width of the text embeddings that the cross-attention reads."""

_PIPELINES = frozenset(
    f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpaint")
)
_LOADED: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"diffusers.UNet2DConditionModel"}),
    "vae": frozenset({"diffusers.AutoencoderKL"}),
    "text_encoder": frozenset({"transformers.CLIPTextModel"}),
    "tokenizer": frozenset({"transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"}),
    "scheduler": frozenset(f"diffusers.{name}" for name in SCHEDULERS),
}
"""Parts of a base model, and the classes each may be of."""
_NOT_LOADED: Mapping[str, frozenset[str]] = {
    "safety_checker": frozenset({"stable_diffusion.StableDiffusionSafetyChecker"}),
    "feature_extractor": frozenset({"transformers.CLIPImageProcessor", "transformers.CLIPFeatureExtractor"}),
    "image_encoder": frozenset({"transformers.CLIPVisionModelWithProjection"}),
}
"""Parts that published models carry and that this server leaves on the disk."""
_WEIGHTS_STEM: Mapping[str, str] = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_CONTROLNET = "ControlNetModel"
_CONFIG_FILE: Mapping[str, str] = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
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
    reader = _Reader(folder, roots)
    reader.refuse_code()
    if reader.has("model_index.json"):
        return _base(reader)
    if reader.has("config.json") and reader.json("config.json").get("_class_name") == _CONTROLNET:
        files = reader.part(".", "config.json", "diffusion_pytorch_model")
        return ResolvedSource(folder, ModelType.CONTROLNET, reader.json("config.json"), tuple(sorted(set(files))))
    pickles = reader.pickles(".")
    if pickles:
        raise UnsafeModel(f"{path}: only pickled weights ({', '.join(pickles)}); allowed: safetensors")
    raise ModelLoadFailed(
        f"{path} is not a model that can be served. Allowed: a folder with model_index.json (base model) or with a "
        f"config.json of class {_CONTROLNET}, or a hub cache folder models--owner--name that holds one"
    )


def detect_family(config: Mapping[str, object]) -> str:
    """The base family that a UNet's or ControlNet's configuration belongs to, by the width of its text embeddings."""
    width = _width(config)
    return _FAMILY_OF_WIDTH.get(width, f"custom{width}")


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


def _base(reader: "_Reader") -> ResolvedSource:
    index = reader.json("model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in _PIPELINES:
        where = reader.folder / "model_index.json"
        raise UnsafeModel(f"{where}: {one_of('pipeline class', pipeline, sorted(_PIPELINES))}")
    for name, value in index.items():
        if isinstance(value, list) and not name.startswith("_"):
            _check_class(reader, name, value)
    missing = [name for name in _LOADED if not isinstance(index.get(name), list)]
    if missing:
        raise ModelLoadFailed(f"{reader.folder}: model_index.json has no {', '.join(missing)}")
    files = {"model_index.json"}
    for name in _LOADED:
        files.update(reader.part(name, _CONFIG_FILE.get(name, "config.json"), _WEIGHTS_STEM.get(name)))
    if "tokenizer/tokenizer.json" not in files and not {"tokenizer/vocab.json", "tokenizer/merges.txt"} <= files:
        raise ModelLoadFailed(f"{reader.folder / 'tokenizer'}: neither tokenizer.json nor vocab.json and merges.txt")
    return ResolvedSource(reader.folder, ModelType.BASE, reader.json("unet/config.json"), tuple(sorted(files)))


def _check_class(reader: "_Reader", name: str, value: list[object]) -> None:
    if value == [None, None]:
        return
    allowed = _LOADED.get(name) or _NOT_LOADED.get(name)
    label = ".".join(str(part) for part in value)
    where = reader.folder / "model_index.json"
    if allowed is None:
        raise UnsafeModel(f"{where}: {one_of('component', name, [*_LOADED, *_NOT_LOADED])} It would be a {label}.")
    if label not in allowed:
        raise UnsafeModel(f"{where}: {one_of(f'class of {name}', label, sorted(allowed))}")


@dataclass(frozen=True, slots=True)
class _Reader:
    """Looks into one model folder, never outside ``roots``. Names are relative to the folder, with slashes."""

    folder: Path
    roots: tuple[Path, ...]

    def has(self, name: str) -> bool:
        try:
            (self.folder / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def file(self, name: str) -> Path:
        """The path of a file that is really there.

        Raises:
            ModelLoadFailed: it is missing, or a link to a blob that was not downloaded.
            UnsafeModel: it is a link that leads out.
        """
        path = self.folder / name
        try:
            real = path.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError, RuntimeError) as error:  # RuntimeError: a loop of links
            raise ModelLoadFailed(f"{path}: missing, the model is incomplete") from error
        if not any(real.is_relative_to(root) for root in self.roots):
            raise UnsafeModel(f"{path}: leads out of the model, to {real}")
        if not real.is_file():
            raise ModelLoadFailed(f"{path}: not a file")
        return path

    def json(self, name: str) -> Mapping[str, object]:
        """A configuration. Raises UnsafeModel if it asks for code of its own (``auto_map``)."""
        path = self.file(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelLoadFailed(f"{path}: {error}") from error
        if not isinstance(value, dict):
            raise ModelLoadFailed(f"{path}: expected a JSON object")
        if "auto_map" in value:
            raise UnsafeModel(f"{path}: auto_map names code that comes with the model")
        return cast("Mapping[str, object]", value)

    def refuse_code(self) -> None:
        """Raises UnsafeModel if there is Python anywhere in the folder, or a folder that is a link."""
        for parent, folders, names in os.walk(self.folder, onerror=_raise):
            links = [name for name in folders if (Path(parent) / name).is_symlink()]
            if links:
                raise UnsafeModel(f"{Path(parent) / links[0]}: folders may not be links")
            code = [name for name in names if name.lower().endswith((".py", ".pyc", ".so"))]
            if code:
                raise UnsafeModel(
                    f"{Path(parent) / code[0]}: code in a model folder is not allowed; it is never needed to load one "
                    "of the classes served here, so delete it or download only configuration and safetensors"
                )

    def pickles(self, part: str) -> list[str]:
        return sorted(path.name for path in (self.folder / part).glob("*") if path.suffix in _PICKLES)

    def part(self, part: str, config: str, stem: str | None) -> list[str]:
        """All files of one component: configuration, vocabulary and, where it has a ``stem``, weights."""
        prefix = "" if part == "." else f"{part}/"
        self.json(prefix + config)
        texts = [path.name for path in (self.folder / part).glob("*") if path.suffix in {".json", ".txt"}]
        for name in texts:
            if name.endswith("config.json"):
                self.json(prefix + name)
        weights = self._weights(part, prefix, stem) if stem else ()
        return [prefix + name for name in (*texts, *weights) if self.file(prefix + name)]

    def _weights(self, part: str, prefix: str, stem: str) -> Iterator[str]:
        """The safetensors files that hold the weights, in one piece or in shards, each with an intact header."""
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        names = {single} if self.has(prefix + single) else set()
        if self.has(prefix + index):
            names.update(self._shards(prefix + index))
        if not names:
            self._no_weights(part, single)
        for name in sorted(names):
            path = self.file(prefix + name)
            try:
                # Reads the header and holds it against the file's length: a file cut short is found here.
                with safe_open(path, framework="numpy"):
                    yield name
            except SafetensorError as error:
                raise ModelLoadFailed(f"{path}: {error}; the file is damaged or incomplete") from error

    def _shards(self, index: str) -> Iterable[str]:
        table = self.json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise ModelLoadFailed(f"{self.folder / index}: no weight_map")
        for name in set(table.values()):
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise UnsafeModel(f"{self.folder / index}: {name!r} is not the name of a safetensors file beside it")
            yield name

    def _no_weights(self, part: str, expected: str) -> None:
        where = self.folder / part
        pickles = self.pickles(part)
        if pickles:
            raise UnsafeModel(f"{where}: only pickled weights ({', '.join(pickles)}); allowed: {expected}")
        others = sorted(path.name for path in where.glob("*.safetensors"))
        raise ModelLoadFailed(f"{where}: {expected} is missing; found {', '.join(others) or 'no weights'}")


def _raise(error: OSError) -> None:
    raise error
