"""The only module that reads YAML or the environment."""

import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from serve_app.config.sections import Port, Section, ServerConfig
from serve_app.config.tree import AppConfig
from serve_app.errors import ConfigError


def secret(name: str | None) -> str | None:
    """The value of a ``*_env`` reference, read where it is used and never kept in a configuration.

    Raises:
        ConfigError: the variable is named but not set.
    """
    if name is None:
        return None
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name} is named in the configuration but not set")
    return value


def set_environment(values: Mapping[str, str]) -> frozenset[str]:
    """Set process environment defaults (thread counts, library switches); what is already set wins.

    Returns the names that were not set before.
    """
    new = frozenset(values) - frozenset(os.environ)
    os.environ.update({name: values[name] for name in new})
    return new


def load_config(path: Path | None = None) -> AppConfig:
    """Read a YAML file (an AppConfig tree, or a Serve config file whose application args hold one).

    Raises:
        ConfigError: the file cannot be read, or has unknown or invalid keys; the message lists all of them.
    """
    if path is None:
        return AppConfig()
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping at the top")
    if "applications" in tree:
        tree = tree["applications"][0].get("args", {})
    try:
        return AppConfig.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in item['loc']) or '(top)'}: {item['msg']}" for item in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


class LaunchSettings(Section):
    """What ``make serve`` reads from the environment."""

    port: Port = 8000
    key: str | None = None
    """API key to accept; None: one is made."""
    config: AppConfig


def launch_settings(environ: Mapping[str, str] = os.environ) -> LaunchSettings:
    """Settings of a one-machine start: CONFIG (YAML file), PORT, DATA and KEY, each optional.

    Raises:
        ConfigError: CONFIG or PORT is invalid. What a key may be, the key store knows.
    """
    config = load_config(Path(environ["CONFIG"]) if environ.get("CONFIG") else None)
    port = environ.get("PORT") or "8000"
    if not port.isdecimal() or not 1 <= int(port) <= 65535:  # noqa: PLR2004 - the range of TCP ports
        raise ConfigError(f"PORT: expected a number from 1 to 65535, got {port!r}")
    update: dict[str, object] = {}
    if environ.get("DATA"):
        update["data"] = Path(environ["DATA"])
    if config.server.public_url == ServerConfig().public_url:
        update["server"] = config.server.model_copy(update={"public_url": f"http://127.0.0.1:{port}"})
    return LaunchSettings(port=int(port), key=environ.get("KEY") or None, config=config.model_copy(update=update))
