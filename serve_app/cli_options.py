"""Options that every command of ``controlnet-serve`` takes, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

from serve_app.config import AppConfig, load_config

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML file: an AppConfig tree or a Serve config file.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Data folder; overrides the configuration's.")]


def read_config(config: Path | None, data: Path | None) -> AppConfig:
    """The configuration that the options name.

    Raises:
        ConfigError: the file is wrong.
    """
    loaded = load_config(config)
    return loaded.model_copy(update={"data": data}) if data is not None else loaded
