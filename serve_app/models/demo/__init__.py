"""The demo model: a miniature Stable Diffusion, trained on scenes that the project draws itself.

With it everything runs, and what comes out can be judged, with no download. The prompt decides the colour of figure and
ground, the control map the shape and where it is; without a map the figure is a blob. It knows nothing else.

Its weights lie in ``trained``; ``train`` and ``export`` made them. This module needs no torch.
"""

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

DEMO_ID = "demo"
DEMO_FAMILY = "demo"
DEMO_CONTROL_TYPES = ("canny", "scribble", "lineart", "segmentation", "depth", "inpaint", "tile", "shuffle")
"""``demo-<type>`` is the ControlNet of each."""

TRAINED = Path(__file__).parent / "trained"
"""The model as the package ships it, in diffusers layout."""

VERSION_FILE = "VERSION"
"""A hash of the weights. Where the model is installed it is written last."""


def demo_net_id(control_type: str) -> str:
    return f"{DEMO_ID}-{control_type}"


def demo_folders(folder: Path) -> dict[str, Path]:
    """Catalogue id to model folder for the demo model under ``folder``, the base model first."""
    names = (DEMO_ID, *(demo_net_id(control_type) for control_type in DEMO_CONTROL_TYPES))
    return {name: folder / name for name in names}


def install_demo(folder: Path, trained: Path = TRAINED) -> dict[str, Path]:
    """Copy the demo model from ``trained`` to ``folder`` unless this version is there whole.

    Returns catalogue id to folder, base first. Written under a temporary name and renamed, so that ``folder`` is never
    half there. Callers in several processes hold a lock around it.

    Raises:
        OSError: the disk is full, or may not be written.
    """
    marker, version = folder / VERSION_FILE, (trained / VERSION_FILE).read_text()
    if not (marker.is_file() and marker.read_text() == version):
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        _copy(trained, partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    return demo_folders(folder)


def version_of(hashes: Iterable[str]) -> str:
    """The version of a demo whose models have these hashes, the base model's first."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _copy(source: Path, target: Path) -> None:
    """Contents alone: with the modes of a read-only package nobody could replace the copy later."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
