"""The demo model: a base model and six ControlNets made by code in seconds, so that everything runs with no download.

It has the shape of Stable Diffusion 1.5, tiny, and goes through the same loading code as any other model. It was not
trained: its weights are random, but for a path laid through them (``weights.py``) by which the VAE keeps pictures
recognisable, samplers stay stable and a control map shows in the output. It knows nothing of the world.
"""

DEMO_ID = "demo"
DEMO_FAMILY = "demo"
DEMO_CONTROL_TYPES = ("canny", "scribble", "inpaint", "lineart", "shuffle", "tile")
"""Built-in control types that need no weights to annotate; ``demo-<type>`` is the ControlNet of each."""


def demo_net_id(control_type: str) -> str:
    return f"{DEMO_ID}-{control_type}"
