"""Which device a process computes on."""

import torch

from serve_app.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device of ``DenoiserConfig.device``: ``auto`` is cuda where torch sees a GPU, else the CPU.

    Raises:
        ConfigError: torch knows no such device, or sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; allowed: auto, cpu, cuda, cuda:0 ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} is configured, but torch sees no GPU")
    return device
