"""Weights from the files that are published to those that services read: converted, verified.

The only place that reads pickles, and only with torch's restricted reader, of files whose hash is the published one.
Services never come here. Messages name paths: they are for the operator at the command line.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from uuid import uuid4

from serve_app.annotators.detectors import check_hash
from serve_app.annotators.weights import LARGEST_BYTES, NETWORKS, Weights, WeightStore
from serve_app.errors import ModelError, ModelLoadFailed, UnsafeModel

_SOURCE = "source_sha256"
"""In the metadata of a safetensors file: the SHA-256 of the pickle that it was converted from."""
_TENSORS = "tensors_sha256"
"""In the same metadata: the SHA-256 of the tensors that ``convert`` wrote, see ``_tensors_sha256``."""

NOTHING_PUBLISHED = "no published hash to compare with"
NO_DIGEST = "converted by an older version: no digest to compare; to have one, delete the file and convert again"


@dataclass(frozen=True, slots=True)
class Verified:
    """A file that its networks load."""

    path: Path
    uncompared: str = ""
    """Why it could not be compared with what was published; empty: it was, and is the same."""

    @property
    def compared(self) -> bool:
        return not self.uncompared


def convert(store: WeightStore, name: str, *, allow_unpinned: bool = False) -> Path | None:
    """Write ``name`` as safetensors under ``owner/name`` in the folder; None where nothing is to be converted.

    Raises:
        ModelLoadFailed: the pickle, or a file that belongs beside it, is not there, or it does not hold what it should.
        UnsafeModel: its hash is not the published one, it holds more than tensors, or no hash is known for it and
            ``allow_unpinned`` is off.
        OSError: a file can't be read or written.
    """
    weights = store.row(name)
    published = weights.converted_from
    if published is None or store.served(name) is not None:
        return None
    path = store.complete(name, published) or store.find(name, published)
    if path is None:
        raise ModelLoadFailed(f"{weights.repo}: {published} is not in {store.folder}; run weights fetch {name}")
    for other in weights.beside:
        if not (path.parent / other).is_file():
            raise ModelLoadFailed(f"{weights.repo}: {other} is not beside {path}; run weights fetch {name}")
    pinned = weights.known_sha256(published)
    if pinned is not None:
        check_hash(path, pinned)
    elif not allow_unpinned:
        raise UnsafeModel(
            f"{path}: no hash is known for this pickle; its SHA-256 is {_sha256(path)}. Compare it with the one that "
            "the hub shows, then say --allow-unpinned"
        )
    state = _read_pickle(path, weights)
    target = store.folder / weights.repo / weights.served
    target.parent.mkdir(parents=True, exist_ok=True)
    for other in weights.beside:
        if (target.parent / other).resolve() != (path.parent / other).resolve():
            with renamed(target.parent / other) as partial:
                shutil.copyfile(path.parent / other, partial)
    source = f"{weights.repo}: {published}"
    metadata = {"format": "pt", "source": source, _SOURCE: pinned or _sha256(path)}
    _write(state, path, target, metadata | {_TENSORS: _tensors_sha256((name, state[name]) for name in sorted(state))})
    return target


def verify(store: WeightStore, name: str) -> Verified:
    """Compare ``name`` with the hashes that are known, and load every network that is made of it.

    Raises:
        AnnotatorUnavailable: a file or a package is missing.
        ModelLoadFailed, UnsafeModel: damaged, another network's, or not made of the published file.
    """
    weights = store.row(name)
    loaders = {network: row.loader for network, row in NETWORKS.items() if row.weights == name}
    for network, loader in loaders.items():
        path = store.require(network)
        uncompared = check_published(path, weights, weights.served)
        try:
            with quiet():
                resolve_name(loader)(path)
        except ModelError:
            raise
        except Exception as error:  # what a damaged file makes of a loader is anybody's guess
            raise ModelLoadFailed(f"{path}: {type(error).__name__}: {first_line(error)}") from error
    return Verified(path, uncompared)


def check_published(path: Path, weights: Weights, file: str) -> str:
    """Why ``path``, which is ``file`` or will be, could not be compared with a published hash; empty: it passed.

    A safetensors file passes by its own hash, or by that of the pickle which ``convert`` made it of, if its tensors are
    still those that were written then.

    Raises:
        ModelLoadFailed: it can't be read, is no safetensors file, or was damaged after it was converted.
        UnsafeModel: it is not what was published.
    """
    try:
        expected = weights.known_sha256(file)
        if file.endswith(".safetensors"):
            source, has_digest = _converted(path)
            pickle_sha256 = weights.known_sha256(weights.converted_from) if weights.converted_from else None
            if pickle_sha256 is not None and source == pickle_sha256:
                return "" if has_digest else NO_DIGEST
            if pickle_sha256 is not None and expected is None and (source is not None or weights.is_pickle):
                raise UnsafeModel(
                    f"{path}: made of a file with the SHA-256 {source or '(it does not say)'}, "
                    f"not {pickle_sha256} as published"
                )
        if expected is not None:
            check_hash(path, expected)
    except OSError as error:
        raise ModelLoadFailed(f"{path}: {error.strerror or error}") from error
    return "" if expected is not None else NOTHING_PUBLISHED


@contextmanager
def renamed(target: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``target`` when all is written, so that nobody sees half a file."""
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back warnings that libraries log, of retries or of every tensor: what fails is raised, and told once."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _converted(path: Path) -> tuple[str | None, bool]:
    """The SHA-256 of the pickle that a safetensors file says it was made of, and whether its tensors have a digest.

    Raises:
        ModelLoadFailed: it is no safetensors file, or its tensors are not those of the digest.
        OSError: it can't be read.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb"):  # safetensors calls what may not be read not there
        pass
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            written = metadata.get(_TENSORS)
            found = written and _tensors_sha256((name, file.get_tensor(name)) for name in sorted(file.keys()))
    except SafetensorError as error:
        raise ModelLoadFailed(f"{path}: not a whole safetensors file: {first_line(error)}") from error
    if found != written:
        raise ModelLoadFailed(f"{path}: damaged: its tensors have the SHA-256 {found}, those converted had {written}")
    return metadata.get(_SOURCE), written is not None


def _tensors_sha256(tensors: Iterable[tuple[str, Any]]) -> str:
    """Of names, types, shapes and bytes of contiguous tensors, in the order given."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_pickle(path: Path, weights: Weights) -> dict[str, Any]:
    """The tensors of a checkpoint by name."""
    import torch

    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError) as error:
        raise ModelLoadFailed(f"{path}: empty, or cut short: {first_line(error)}") from error
    except Exception as error:  # what a foreign pickle raises is anybody's guess
        raise UnsafeModel(f"{path}: torch's restricted reader refuses it: {first_line(error)}") from error
    for key in weights.inner:
        if not isinstance(value, Mapping) or key not in value:
            raise ModelLoadFailed(f"{path}: no {'.'.join(weights.inner)} in it")
        value = value[key]
    if not isinstance(value, Mapping) or not value or not all(map(_is_plain, value.values())):
        raise ModelLoadFailed(f"{path}: expected names and plain tensors")
    # A view may be any number of times as large as its file.
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in value.values())
    if size_bytes > LARGEST_BYTES:
        raise ModelLoadFailed(f"{path}: holds {size_bytes} bytes of tensors; allowed: {LARGEST_BYTES}")
    # Contiguous copies: safetensors holds no views and no tensor twice.
    return {
        str(name).removeprefix(weights.prefix): tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in value.items()
    }


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with numbers in memory: not sparse, not quantised, not without storage."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _write(state: dict[str, Any], origin: Path, target: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with renamed(target) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask wants it; safetensors would keep the file to this user
        try:
            save_file(state, partial, metadata)
            partial.chmod(mode)
        except (SafetensorError, RuntimeError, ValueError, LookupError) as error:
            raise ModelLoadFailed(f"{origin}: cannot be written as safetensors: {first_line(error)}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
