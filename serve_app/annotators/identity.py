"""What a map follows from beside the request: code, libraries, kind of device, weights. Part of the cache's keys."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Final

from serve_app.annotators.detectors import DetectorHost, FileState
from serve_app.annotators.table import ANNOTATORS

_DECIDING_PACKAGES: Final = (
    *("controlnet-aux", "mediapipe", "numpy", "pillow", "scikit-image", "scipy", "timm", "torch", "torchvision"),
    "transformers",
)
"""Beside OpenCV, which comes from distributions of several names that overwrite each other."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one annotator on this replica."""

    digest: str
    """SHA-256, hex."""
    files: tuple[FileState, ...]
    """The weights it is of: a network made of other files has another identity."""


class Identities:
    """Of every annotator. Hashes each file once; every method is safe in any thread."""

    def __init__(self, host: DetectorHost) -> None:
        self._host = host
        self._digests: dict[FileState, str] = {}

    def of(self, annotator: str) -> Identity | None:
        """The identity of an annotator with the networks that are in memory, or else would be loaded now.

        None where the files of a loaded network are gone before they were hashed: nobody can say what it is.

        Raises:
            AnnotatorUnavailable: weights are missing.
        """
        networks = ANNOTATORS[annotator].networks
        states = self._host.files(networks)
        digests = [self._digest(state) for state in states]
        if None in digests:
            return None
        parts = [code_digest(), self._host.device_type if networks else "", *digests]
        return Identity(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), states)

    def _digest(self, state: FileState) -> str | None:
        if state not in self._digests:
            path = Path(state.path)
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if FileState.of(path) != state:
                    return None
            except OSError:
                return None
            self._digests[state] = digest
        return self._digests[state]


@cache
def code_digest() -> str:
    """A hash of the source files that decide a map and of the versions of the packages that they compute with."""
    import cv2

    code = hashlib.sha256()
    own = (file for file in files("serve_app.annotators").iterdir() if file.name.endswith(".py"))
    for file in (files("serve_app") / "images.py", *sorted(own, key=lambda one: one.name)):
        code.update(file.read_bytes())
    versions = [f"cv2=={cv2.__version__}", *map(_version, _DECIDING_PACKAGES)]
    code.update(json.dumps(versions).encode())
    return code.hexdigest()


def _version(package: str) -> str:
    try:
        return f"{package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} absent"
