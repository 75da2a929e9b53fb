"""Weights from a mirror in S3: an operator's own copy of the weights folder, for clusters that never reach the hub.

Objects have the names of the plain layout, ``prefix/owner/name/file``. Credentials, region and endpoint are boto3's
(``AWS_ACCESS_KEY_ID``, ``AWS_PROFILE``, ``AWS_REGION``, ``AWS_ENDPOINT_URL_S3`` ...). No message holds any of them.
"""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from serve_app.annotators.convert import check_published, renamed
from serve_app.annotators.weights import LARGEST_BYTES, WeightStore
from serve_app.config import FetchConfig
from serve_app.errors import ConfigError, ModelLoadFailed, UnsafeModel

_URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>[^\s?#]*))?")
_ABSENT = {"404", "NoSuchKey", "403", "AccessDenied"}
"""Codes of an object that is not there; without the right to list, S3 answers as if it were forbidden."""
_CHUNK_BYTES = 1024 * 1024
_ATTEMPTS = 2


class _Absent(Exception):
    """There is no such object; the text says what the store answered."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """Objects of one bucket below a prefix."""

    bucket: str
    prefix: str
    """Without slashes at its ends; may be empty."""
    client: Any
    """boto3's, for S3."""
    largest_bytes: int = LARGEST_BYTES
    """Larger objects are refused before they are read."""

    @classmethod
    def open(cls, url: str, config: FetchConfig) -> Self:
        """``url``: ``s3://bucket/prefix``. Connects to nothing yet.

        Raises:
            ConfigError: that is no such URL, or boto3 can't use its own configuration.
        """
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError("the mirror must be s3://bucket or s3://bucket/prefix")
        from boto3.session import Session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        options = Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.total_timeout_s,
            retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        )
        try:
            client = Session().client("s3", config=options)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"boto3 cannot be used for {url}: {type(error).__name__}") from error
        return cls(match["bucket"], (match["prefix"] or "").strip("/"), client)

    def fetch(self, store: WeightStore, name: str) -> Path:
        """Download what ``name`` needs into the plain layout: what services read if it is there, else the pickle.

        A file that is there and known to be the published one is kept.

        Raises:
            ModelLoadFailed: the mirror has no such object, fails, or holds damaged files.
            UnsafeModel: an object is not what was published, or too large; nothing of it is kept.
            OSError: the folder can't be written.
        """
        weights = store.row(name)
        for other in weights.beside:
            try:
                self._get(store, name, other)
            except _Absent as error:
                raise ModelLoadFailed(f"the mirror lacks a file: {error}") from error
        absent: list[str] = []
        for file in dict.fromkeys(filter(None, (weights.served, weights.converted_from))):
            try:
                return self._get(store, name, file)
            except _Absent as error:
                absent.append(str(error))
        raise ModelLoadFailed(f"the mirror lacks the weights: {'; '.join(absent)}")

    def _get(self, store: WeightStore, name: str, file: str) -> Path:
        weights = store.row(name)
        target = store.folder / weights.repo / file
        if target.is_file() and _is_published(target, store, name):
            return target
        key = "/".join(filter(None, (self.prefix, weights.repo, file)))
        where = f"s3://{self.bucket}/{key}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with renamed(target) as partial:
            with _boto_errors(where):
                self._download(key, where, partial)
            if file not in weights.beside:
                try:
                    check_published(partial, weights, file)
                except (ModelLoadFailed, UnsafeModel) as error:  # it names a file that is gone in a moment
                    raise type(error)(error.message.replace(str(partial), where)) from error
        return target

    def _download(self, key: str, where: str, path: Path) -> None:
        answer = self.client.get_object(Bucket=self.bucket, Key=key)
        read_bytes = 0
        with closing(answer["Body"]) as body, path.open("wb") as out:
            size_bytes = answer["ContentLength"]
            if size_bytes > self.largest_bytes:
                raise UnsafeModel(f"{where}: has {size_bytes} bytes; allowed: {self.largest_bytes}")
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                read_bytes += len(chunk)
                if read_bytes > size_bytes:
                    raise ModelLoadFailed(f"{where}: is longer than the store says")
                out.write(chunk)


def _is_published(path: Path, store: WeightStore, name: str) -> bool:
    try:
        return not check_published(path, store.row(name), path.name)
    except (ModelLoadFailed, UnsafeModel):
        return False


@contextmanager
def _boto_errors(where: str) -> Iterator[None]:
    """boto3's errors in our words: codes and names only, for their texts may quote what they were configured with."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "?"))
        if code in _ABSENT:
            raise _Absent(f"{where}: {code}") from error
        raise ModelLoadFailed(f"{where}: the store answers {code}") from error
    except BotoCoreError as error:  # the names say it: NoCredentialsError, EndpointConnectionError ...
        raise ModelLoadFailed(f"{where}: not downloaded: {type(error).__name__}") from error
