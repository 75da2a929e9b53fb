"""The demo model: a miniature Stable Diffusion, trained on scenes that the project draws itself.

With it everything runs, and what comes out can be judged, with no download. The prompt decides what is drawn, the
control map where. It knows coloured shapes on coloured grounds and nothing else of the world.

Its weights lie in ``trained``; ``train`` and ``export`` made them. This module needs no torch.
"""

import shutil
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


def install_demo(folder: Path) -> dict[str, Path]:
    """Copy the demo model to ``folder`` unless this version is there whole; catalogue id to folder, base first.

    Written under a temporary name and renamed, so that ``folder`` is never half there. Callers in several processes
    hold a lock around it.
    """
    marker, version = folder / VERSION_FILE, (TRAINED / VERSION_FILE).read_text()
    if not (marker.is_file() and marker.read_text() == version):
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(TRAINED, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return demo_folders(folder)
