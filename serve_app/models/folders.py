"""Looks into one model folder: which files loading will read, and that none of them is code or leads elsewhere.

Knows file names, not models; which parts there have to be is the business of ``sources``.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from safetensors import SafetensorError, safe_open

from serve_app.errors import ModelLoadFailed, UnsafeModel

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_REDIRECTS: Mapping[str, str] = {
    "auto_map": "names code that comes with the model",
    "transformers_weights": "makes transformers read another file than the one that was checked",
}
"""Keys of configurations that libraries obey and that no model served here needs."""

HALF = "fp16"
"""The variant that published models ship beside, or instead of, full precision."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Looks into one model folder, never outside ``roots``. Names are relative to the folder, with slashes."""

    path: Path
    roots: tuple[Path, ...]

    def has(self, name: str) -> bool:
        try:
            (self.path / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def file(self, name: str) -> Path:
        """The path of a file that is really there.

        Raises:
            ModelLoadFailed: it is missing, or a link to a blob that was not downloaded.
            UnsafeModel: it is a link that leads out.
        """
        path = self.path / name
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
        """A configuration. Raises UnsafeModel if it asks for code of its own or for other files."""
        path = self.file(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelLoadFailed(f"{path}: {error}") from error
        if not isinstance(value, dict):
            raise ModelLoadFailed(f"{path}: expected a JSON object")
        for key in _REDIRECTS.keys() & value.keys():
            raise UnsafeModel(f"{path}: {key} {_REDIRECTS[key]}")
        return cast("Mapping[str, object]", value)

    def refuse_code(self) -> None:
        """Raises UnsafeModel if there is Python anywhere in the folder, or a folder that is a link."""
        for parent, folders, names in os.walk(self.path, onerror=_raise):
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
        return sorted(path.name for path in (self.path / part).glob("*") if path.suffix in _PICKLES)

    def part(self, part: str, config: str, stem: str | None) -> list[str]:
        """All files of one component: configuration, vocabulary and, where it has a ``stem``, weights."""
        prefix = "" if part == "." else f"{part}/"
        self.json(prefix + config)
        texts = [path.name for path in (self.path / part).glob("*") if path.suffix in {".json", ".txt"}]
        for name in texts:
            if name.endswith("config.json"):
                self.json(prefix + name)
        weights = self._weights(part, prefix, stem) if stem else ()
        return [prefix + name for name in (*texts, *weights) if self.file(prefix + name)]

    def _weights(self, part: str, prefix: str, stem: str) -> Iterator[str]:
        """The safetensors files that hold the weights, in one piece or in shards, each with an intact header.

        In full precision where they are there, else in half precision (``fp16``), named as diffusers and transformers
        look for them.
        """
        names: set[str] = set()
        for single, index in (_weight_names(stem, None), _weight_names(stem, HALF)):
            if self.has(prefix + index):
                names.update(self._shards(prefix + index))
            if self.has(prefix + single):
                names.add(single)
            if names:
                break
        else:
            self._no_weights(part, stem)
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
            raise ModelLoadFailed(f"{self.path / index}: no weight_map")
        for name in set(table.values()):
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise UnsafeModel(f"{self.path / index}: {name!r} is not the name of a safetensors file beside it")
            yield name

    def _no_weights(self, part: str, stem: str) -> NoReturn:
        where = self.path / part
        allowed = " or ".join(_weight_names(stem, variant)[0] for variant in (None, HALF))
        pickles = self.pickles(part)
        if pickles:
            raise UnsafeModel(f"{where}: only pickled weights ({', '.join(pickles)}); allowed: {allowed}")
        others = sorted(path.name for path in where.glob("*.safetensors"))
        raise ModelLoadFailed(f"{where}: {allowed} is missing; found {', '.join(others) or 'no weights'}")


def _weight_names(stem: str, variant: str | None) -> tuple[str, str]:
    """File names of weights in one piece, and of the index of weights in shards."""
    if variant is None:
        return f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    return f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"


def _raise(error: OSError) -> None:
    raise error
