"""The sections that are no deployment: what clients see, what is stored where, what may be asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
ModelId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""Starts with a letter or digit, holds no separators: safe as a file name and in a URL."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerConfig(Section):
    """What clients see of the HTTP side."""

    public_url: str = "http://127.0.0.1:8000"
    """Base of every URL in an answer; no trailing slash needed."""
    sync_wait_s: Annotated[float, Field(ge=0, le=600)] = 25.0
    """How long a submit waits for its picture before it answers ``processing``."""
    max_body_bytes: Count = 20 * 1024 * 1024
    cors_origins: tuple[str, ...] = ("*",)


class DatabaseConfig(Section):
    url: str | None = None
    """SQLAlchemy URL without a password; None: SQLite in the data folder."""
    password_env: str | None = None
    """Name of the environment variable that holds the password."""
    pool_size: Count = 5

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).password is not None:
            raise ValueError("holds a password; name its variable in password_env: what is deployed can be read")
        return url


class StorageConfig(Section):
    url: str | None = None
    """``file:///folder``; None: a folder in the data folder."""
    shared: bool = False
    """The operator's word that every node sees the same folder under this path."""


class ModelSource(Section):
    """A model to publish at start."""

    id: ModelId
    path: Path
    """Folder in diffusers layout, or a repository folder of a HF hub cache (``models--owner--name``)."""
    family: str | None = None
    """Base family; None: read from the model's own configuration."""
    control_type: str | None = None
    """For a ControlNet: the built-in id (``canny`` ...) it answers to. A ControlNet-Union is known by its files."""


class FetchConfig(Section):
    """The guarded HTTP client. Only globally routable addresses are reached unless listed here."""

    allow_hosts: tuple[str, ...] = ()
    """Host names or address literals that may resolve to private addresses, e.g. an image store of your own."""
    allow_cidrs: tuple[str, ...] = ()
    ports: tuple[Port, ...] = (80, 443)
    allow_any_port_on_allowed_hosts: bool = True
    connect_timeout_s: Seconds = 5.0
    total_timeout_s: Seconds = 20.0
    max_redirects: Annotated[int, Field(ge=0, le=10)] = 3
    max_url_length: Count = 2048


class ImageLimits(Section):
    max_bytes: Count = 10 * 1024 * 1024
    max_pixels: Count = 40_000_000
    max_side: Count = 16384


class SizeLimits(Section):
    max_width: Annotated[int, Field(ge=64, multiple_of=8)] = 1024
    max_height: Annotated[int, Field(ge=64, multiple_of=8)] = 1024


class LimitsConfig(SizeLimits):
    """What one request and one key may ask for."""

    queue_max: Count = 1000
    """Queued jobs in the whole cluster; one more is answered with 'Rate limit exceeded'."""
    queue_max_per_tenant: Count | None = None
    requests_per_minute: Count | None = None
    """Submits per key; None: no limit."""
    families: Mapping[str, SizeLimits] = Field(default_factory=dict)
    """Sizes of a base family in place of the general ones, e.g. ``sdxl: {max_width: 1536, max_height: 1536}``."""
    max_controls: Count = 8


class PromptsConfig(Section):
    enhance_suffix: str = ", highly detailed, sharp focus, professional photography"
    """Appended to the prompt by ``enhance_prompt: yes``."""
    styles: Mapping[str, str] = Field(
        default_factory=lambda: {
            "enhance": "award winning, 4k, harmonious",
            "cinematic-diva": "cinematic portrait, studio lighting, dramatic",
            "abstract-expressionism": "abstract expressionism, bold brush strokes",
            "academia": "academia aesthetic, muted browns, old library",
            "anime": "anime style, clean lines, vibrant colours",
            "isometric": "isometric view, clean geometry",
            "watercolor": "watercolour painting, soft washes",
        }
    )
    """``enhance_style`` name to suffix."""


class SafetyConfig(Section):
    required: bool = False
    """Refuse ``safety_checker: yes`` where no safety model is loaded, instead of telling it in meta."""


class CompatConfig(Section):
    hosted_defaults: bool = False
    """Use the hosted API's default for enhance_prompt (``yes``)."""


class WebhookConfig(Section):
    timeout_s: Seconds = 10.0
    secret_env: str | None = None
    """Name of the variable with the Standard Webhooks secret (``whsec_`` + base64); None: unsigned."""
