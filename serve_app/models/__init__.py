"""Models: what exists (catalog), where it comes from (sources, publish), and getting it into memory (loading, cache).

Everything is read from local folders. The switches below are set before any module of this package imports diffusers
or transformers, which read them once: no library goes online on its own, none runs code that came with a model.
"""

from serve_app.config import set_environment

KEPT_OFFLINE_HERE = "HF_HUB_OFFLINE" in set_environment({"HF_HUB_OFFLINE": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"})
"""Whether nobody had set that switch: what was asked to go online may, where the operator has not forbidden it."""
