"""Weights from where they are published to files that services read: fetched, converted, verified.

The only place that reads pickles, and only with torch's restricted reader, of files whose hash is the published one.
Services never come here.
"""

import asyncio
import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from uuid import uuid4

from serve_app.annotators.detectors import check_hash
from serve_app.annotators.weights import NETWORKS, Weights, WeightStore
from serve_app.config import FetchConfig
from serve_app.errors import ModelLoadFailed, UnsafeModel
from serve_app.fetching import GuardedClient

_LARGEST_TASK = 64 * 1024 * 1024


def fetch(store: WeightStore, name: str, config: FetchConfig) -> Path:
    """Download what ``name`` needs into the folder: from the hub into the hub's own layout, at the pinned revision.

    ``config``: for what is not on the hub. Where the hub is, ``HF_ENDPOINT`` says, as for all of its clients.

    Raises:
        ModelLoadFailed: the repository lacks the file, or the hub is not reached.
        UnsafeModel: what came is not what was published.
        FetchFailed: a file that is not on the hub can't be fetched.
    """
    weights = store.row(name)
    if weights.url is not None:
        return _fetch_url(store, weights, weights.url, config)
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def get(file: str) -> Path:
        return Path(hf_hub_download(weights.repo, file, revision=weights.revision, cache_dir=store.folder))

    # Services are kept offline by a switch that this library reads once, at import; this command is here to go online.
    constants.HF_HUB_OFFLINE = False
    try:
        for other in weights.beside:
            get(other)
        try:
            path = get(weights.file)
        except EntryNotFoundError:
            if weights.pickle is None:
                raise
            path = get(weights.pickle)
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelLoadFailed(f"{weights.label}: {error}") from error
    if weights.sha256 is not None:
        check_hash(path, weights.sha256)
    return path


def convert(store: WeightStore, name: str, *, allow_unpinned: bool = False) -> Path | None:
    """Write ``name`` as safetensors under ``owner/name`` in the folder; None where nothing is to be converted.

    Raises:
        ModelLoadFailed: the pickle, or a file that belongs beside it, is not there, or it does not hold what it should.
        UnsafeModel: its hash is not the published one, it holds more than tensors, or no hash is known for it and
            ``allow_unpinned`` is off.
    """
    weights = store.row(name)
    if store.served(name) is not None or not (weights.is_pickle or weights.pickle):
        return None
    published = weights.file if weights.is_pickle else str(weights.pickle)
    path = store.find(name, published)
    if path is None:
        raise ModelLoadFailed(f"{weights.repo}: {published} is not in {store.folder}; run weights fetch {name}")
    for other in weights.beside:
        if not (path.parent / other).is_file():
            raise ModelLoadFailed(f"{weights.repo}: {other} is not beside {path}; run weights fetch {name}")
    pinned = weights.sha256 if weights.is_pickle else None
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
            shutil.copyfile(path.parent / other, target.parent / other)
    _write(state, target, {"format": "pt", "source": weights.label, "source_sha256": pinned or _sha256(path)})
    return target


def verify(store: WeightStore, name: str) -> Path:
    """Check the hashes that are known, and load every network that is made of ``name``.

    Raises:
        AnnotatorUnavailable: a file or a package is missing.
        ModelLoadFailed, UnsafeModel: damaged, another network's, or not made of the published file.
    """
    weights = store.row(name)
    for network, row in NETWORKS.items():
        if row.weights != name:
            continue
        path = store.require(network)
        _check_origin(path, weights)
        resolve_name(row.loader)(path)
    return path


def _check_origin(path: Path, weights: Weights) -> None:
    if weights.sha256 is None:
        return
    if not weights.is_pickle:
        check_hash(path, weights.sha256)
        return
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        origin = (file.metadata() or {}).get("source_sha256")
    if origin != weights.sha256:
        raise UnsafeModel(f"{path}: made of a file with the SHA-256 {origin}, not {weights.sha256} as published")


def _fetch_url(store: WeightStore, weights: Weights, url: str, config: FetchConfig) -> Path:
    async def get() -> bytes:
        async with GuardedClient(config) as client:
            return await client.get(url, _LARGEST_TASK)

    data = asyncio.run(get())
    found = hashlib.sha256(data).hexdigest()
    if weights.sha256 is not None and found != weights.sha256:
        raise UnsafeModel(f"{url}: its SHA-256 is {found}, not {weights.sha256} as published")
    target = store.folder / weights.repo / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with _renamed(target) as partial:
        partial.write_bytes(data)
    return target


def _read_pickle(path: Path, weights: Weights) -> dict[str, Any]:
    """The tensors of a checkpoint by name."""
    import torch

    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError) as error:
        raise ModelLoadFailed(f"{path}: empty, or cut short: {_first_line(error)}") from error
    except Exception as error:  # what a foreign pickle raises is anybody's guess
        raise UnsafeModel(f"{path}: torch's restricted reader refuses it: {_first_line(error)}") from error
    for key in weights.inner:
        if not isinstance(value, Mapping) or key not in value:
            raise ModelLoadFailed(f"{path}: no {'.'.join(weights.inner)} in it")
        value = value[key]
    if not isinstance(value, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise ModelLoadFailed(f"{path}: expected names and tensors")
    # Contiguous copies: safetensors holds no views and no tensor twice.
    return {
        str(name).removeprefix(weights.prefix): tensor.detach().clone().contiguous() for name, tensor in value.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _write(state: dict[str, Any], target: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with _renamed(target) as partial:
        save_file(state, partial, metadata)


@contextmanager
def _renamed(target: Path) -> Iterator[Path]:
    """A name to write to; it becomes ``target`` when all is written, so that nobody sees half a file."""
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
