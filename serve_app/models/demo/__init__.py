"""The demo model: a base model and six ControlNets made by code in seconds, so that everything runs with no download.

It has the shape of Stable Diffusion 1.5, tiny, and goes through the same loading code as any other model. It was not
trained: its weights are random, but for a path laid through them (``weights.py``) by which the VAE keeps pictures
recognisable, samplers stay stable and a control map shows in the output. It knows nothing of the world.

This module needs no torch: a process that finds the demo complete doesn't either.
"""

from pathlib import Path

DEMO_ID = "demo"
DEMO_FAMILY = "demo"
DEMO_CONTROL_TYPES = ("canny", "scribble", "inpaint", "lineart", "shuffle", "tile")
"""Built-in control types that need no weights to annotate; ``demo-<type>`` is the ControlNet of each."""

TRAINED = Path(__file__).parent / "trained"
"""The model as the package ships it, in diffusers layout."""

VERSION = "2"
"""Goes up with every change of what is built; a folder of another version is built anew."""
VERSION_FILE = "VERSION"
"""Written last."""


def demo_net_id(control_type: str) -> str:
    return f"{DEMO_ID}-{control_type}"


def demo_folders(folder: Path) -> dict[str, Path]:
    """Catalogue id to model folder for the demo model under ``folder``, the base model first."""
    names = (DEMO_ID, *(demo_net_id(control_type) for control_type in DEMO_CONTROL_TYPES))
    return {name: folder / name for name in names}


def is_complete(folder: Path) -> bool:
    """Whether the demo model of this version lies under ``folder``, whole."""
    marker = folder / VERSION_FILE
    return marker.is_file() and marker.read_text() == VERSION
