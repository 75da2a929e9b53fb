"""Weights from where they are published onto this machine: the Hugging Face hub, or an address of their own.

For the operator at the command line: it goes online, and its messages name paths. Nothing here reads a pickle.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from serve_app.annotators.convert import check_published, first_line, quiet, renamed
from serve_app.annotators.weights import LARGEST_BYTES, Weights, WeightStore
from serve_app.config import FetchConfig
from serve_app.errors import FetchFailed, ModelError, ModelLoadFailed, UnsafeModel
from serve_app.fetching import GuardedClient
from serve_app.models import KEPT_OFFLINE_HERE

_LARGEST_TASK = 64 * 1024 * 1024


def fetch(store: WeightStore, name: str, config: FetchConfig) -> Path:
    """Download what ``name`` needs into the folder: from the hub into the hub's own layout, at the pinned revision.

    What is there already is not downloaded again. Where the hub is, ``HF_ENDPOINT`` says, as for all of its clients,
    and ``HF_HUB_OFFLINE`` forbids to ask it.

    Raises:
        ModelLoadFailed: the file is not there, or where it is published is not reached.
        UnsafeModel: what came is not what was published; it is deleted.
    """
    weights = store.row(name)
    if weights.url is not None:
        return _from_url(store, weights, weights.url, config)
    from huggingface_hub import constants
    from huggingface_hub.errors import RemoteEntryNotFoundError

    # Services are kept offline by a switch that this library reads once, at import; this command is here to go online.
    if KEPT_OFFLINE_HERE:
        constants.HF_HUB_OFFLINE = False
    if constants.HF_HUB_OFFLINE:
        return _already_there(store, name)
    with quiet(), _hub_errors(weights):
        for other in weights.beside:
            _from_hub(store, name, other, config)
        try:
            path = _from_hub(store, name, weights.file, config)
        except RemoteEntryNotFoundError:
            if weights.pickle is None:
                raise
            path = _from_hub(store, name, weights.pickle, config)
    try:
        check_published(path, weights, path.name)
    except ModelError:
        _delete(path, store.folder)
        raise
    return path


def _from_hub(store: WeightStore, name: str, file: str, config: FetchConfig) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    weights = store.row(name)
    pinned_folder = store.folders(name)[-1]
    if weights.revision is not None and (pinned_folder / file).is_file():
        return pinned_folder / file
    # One short question first: to a hub that is not reached the download would put it six times, for half a minute.
    url = hf_hub_url(weights.repo, file, revision=weights.revision)
    size_bytes = get_hf_file_metadata(url, timeout=config.connect_timeout_s).size
    if size_bytes is not None and size_bytes > LARGEST_BYTES:
        raise UnsafeModel(f"{weights.repo}: {file} has {size_bytes} bytes; allowed: {LARGEST_BYTES}")
    return Path(hf_hub_download(weights.repo, file, revision=weights.revision, cache_dir=store.folder))


@contextmanager
def _hub_errors(weights: Weights) -> Iterator[None]:
    """The library's errors in one line each."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    where = f"{weights.label} at revision {weights.revision or 'main'}"
    hub = urlsplit(constants.ENDPOINT).hostname
    try:
        yield
    except RemoteEntryNotFoundError as error:
        raise ModelLoadFailed(f"{where}: the hub ({hub}) has no such file, or not what belongs beside it") from error
    except HfHubHTTPError as error:
        raise ModelLoadFailed(f"{where}: the hub ({hub}) answers {error.response.status_code}") from error
    except httpx2.HTTPError as error:
        raise ModelLoadFailed(
            f"{where}: the hub ({hub}) is not reached: {first_line(error)}. Where it never is, put the files into "
            f"{weights.repo} below the weights folder, or say --mirror"
        ) from error
    except OSError as error:
        raise ModelLoadFailed(f"{where}: {first_line(error)}") from error


def _already_there(store: WeightStore, name: str) -> Path:
    weights = store.row(name)
    if (path := store.served(name)) is not None:
        return path
    if weights.converted_from and (path := store.complete(name, weights.converted_from)) is not None:
        return path
    files = " or ".join(file for file in (weights.file, weights.pickle) if file)
    also = "".join(f" and {other}" for other in weights.beside)
    raise ModelLoadFailed(
        f"HF_HUB_OFFLINE is set, so nothing is downloaded; put {files}{also} of {weights.repo} at revision "
        f"{weights.revision or 'main'} into {store.folder / weights.repo}, say --mirror, or unset it"
    )


def _from_url(store: WeightStore, weights: Weights, url: str, config: FetchConfig) -> Path:
    async def get() -> bytes:
        async with GuardedClient(config) as client:
            return await client.get(url, _LARGEST_TASK)

    try:
        with quiet():
            data = asyncio.run(get())
    except FetchFailed as error:
        cause = first_line(error.__cause__) if isinstance(error.__cause__, Exception) else "refused"
        raise ModelLoadFailed(f"{url}: not downloaded: {cause}") from error
    target = store.folder / weights.repo / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with renamed(target) as partial:
        partial.write_bytes(data)
        check_published(partial, weights, weights.file)
    return target


def _delete(path: Path, folder: Path) -> None:
    """Take a file out of the hub's cache, with the blob that it may be a link to, so that nobody reads it again."""
    blob = path.resolve()
    path.unlink()
    if blob.is_relative_to(folder.resolve()):
        blob.unlink(missing_ok=True)
