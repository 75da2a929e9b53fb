"""The Stable Diffusion ControlNet server; knows no Ray except in the one function below.

``serve run serve_app:app`` and Serve's YAML files (``import_path: serve_app:app``) call ``app``. Serve reads the type
of its parameter to validate ``args:`` of a YAML file, so it must be a real class here, not a string.
"""

from typing import TYPE_CHECKING

from serve_app.config import AppConfig

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["AppConfig", "app"]


def app(config: AppConfig) -> "Application":
    """Bind the deployment graph. Only binds: no key, no migration and no download happens here."""
    from deployments.application import build

    return build(config)
