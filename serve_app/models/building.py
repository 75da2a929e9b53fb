"""One lock for everybody in a process who builds models with diffusers or transformers. No torch here."""

import threading
from typing import Final

ONE_AT_A_TIME: Final = threading.Lock()
"""Both libraries replace functions of torch.nn while they build an empty model: two loads at once would mix them up."""
