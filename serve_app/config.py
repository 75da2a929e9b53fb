"""The configuration: one frozen tree, read once at the entry, handed down in sections.

The only module that reads YAML or the environment. Unknown keys are refused. Secrets are never values here: a field
that ends in ``_env`` holds the *name* of an environment variable, because whatever Ray Serve deploys can be read in
its dashboard.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator

from serve_app.errors import ConfigError, UnknownModel, one_of

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


class AutoscalingConfig(Section):
    """Handed to Ray Serve as it is; see its documentation of ``autoscaling_config``."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 1
    initial_replicas: Annotated[int, Field(ge=0)] | None = None
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    upscale_delay_s: Annotated[float, Field(ge=0)] = 0.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ReplicaConfig(Section):
    """Size and number of the replicas of one deployment."""

    replicas: Count = 1
    autoscaling_config: AutoscalingConfig | None = None
    """Given: overrides ``replicas``."""
    num_cpus: Annotated[float, Field(ge=0)] = 0.1
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Count = 1
    """Threads of torch and OpenMP in one replica."""
    graceful_shutdown_timeout_s: Seconds = 120.0


class DenoiserConfig(ReplicaConfig):
    """One deployment of engine replicas."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")] = "Denoiser"
    families: tuple[str, ...] = ()
    """Base families served here; empty: every family that no other denoiser names."""
    device: str = "auto"
    """``auto``: cuda where torch sees a GPU, else cpu."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """``auto``: float16 on cuda, float32 on cpu."""
    max_rows: Annotated[int, Field(ge=2)] = 16
    """Rows of one UNet forward at most."""
    max_latent_area: Count = 16 * 128 * 128
    """Rows x latent height x latent width of one UNet forward at most."""
    deterministic: StrictBool | Annotated[int, Field(ge=2)] = False
    """Draw pictures that are equal byte for byte whatever else is drawn beside them; else they may differ by 1/255 a
    channel, because libraries pick their kernels by the number of rows. Every forward then runs in one number of rows
    for its latent size, filled up where there are fewer: ``true`` picks it by the size (4 at 512x512, 2 at 1024x1024;
    see ``engine.batching.Budget.pinned_rows``), a number sets it. A request alone takes up to twice as long with
    ``true``, and full forwards are smaller. Equality is per device type and library versions, and needs the same
    number on every replica."""
    max_running: Count = 16
    """Requests that hold engine state at once. The oldest finish first and one that guides fills two rows, so that
    ``max_rows / 2`` requests fill a forward; twice that covers those that encode or decode, more would only hold
    memory."""
    waiting_room: Annotated[int, Field(ge=0)] = 4
    """Requests a replica takes beyond that, so that it never runs dry."""
    model_memory_bytes: Count = 16 * 1024**3
    """Budget of the component cache; the least recently used component that no request holds goes first."""
    encode_workers: Count = 2
    """Threads that encode and store PNGs."""

    @property
    def max_ongoing(self) -> int:
        """Requests one replica holds, running and waiting."""
        return self.max_running + self.waiting_room

    @property
    def capacity(self) -> int:
        """Requests all replicas hold at their largest number; more than that is kept in the database."""
        scaling = self.autoscaling_config
        return self.max_ongoing * (scaling.max_replicas if scaling else self.replicas)


class AnnotatorConfig(ReplicaConfig):
    max_ongoing: Count = 4
    map_store_bytes: Annotated[int, Field(ge=0)] = 1024**3
    """Control maps of detectors with weights that all replicas together keep in the object store; 0: none."""
    weights_folder: Path | None = None
    """Where the detectors' weights lie, see ``controlnet-serve weights``; None: ``annotators`` in the data folder."""
    device: str = "auto"
    """As ``DenoiserConfig.device``, for detectors with weights; on Ray ``auto`` with ``num_gpus: 0`` is the CPU."""
    detector_memory_bytes: Count = 4 * 1024**3
    """Budget of the loaded detectors; the least recently used one that no request holds goes first."""


class GatewayConfig(ReplicaConfig):
    max_ongoing_requests: Count = 4000


class DispatcherConfig(ReplicaConfig):
    lease_s: Seconds = 20.0
    """A claimed job whose lease is not renewed for this long goes back to the queue."""
    poll_s: Seconds = 0.5
    """How often a dispatcher looks for work when nobody nudges it."""
    max_jobs: Count = 512
    """Jobs one dispatcher drives at once."""
    max_attempts: Count = 5
    attempt_timeout_s: Seconds = 21_600.0
    """A last resort against a call that was lost without a word. An attempt's time covers waiting for a replica and
    for the engine, however long the queue there is; a replica that hangs is found by its own health check."""


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


class AppConfig(Section):
    """The whole configuration. Every default is right for one machine."""

    data: Path = Path("data")
    """Folder for everything that has no place of its own: database, objects, demo model."""
    nodes: Literal["one", "many"] = "one"
    """``many`` refuses SQLite and folders that are not declared shared."""
    demo_model: bool = True
    models: tuple[ModelSource, ...] = ()
    models_folder: Path | None = None
    """Where published models live; None: in the data folder."""
    server: ServerConfig = ServerConfig()
    database: DatabaseConfig = DatabaseConfig()
    storage: StorageConfig = StorageConfig()
    fetch: FetchConfig = FetchConfig()
    images: ImageLimits = ImageLimits()
    limits: LimitsConfig = LimitsConfig()
    prompts: PromptsConfig = PromptsConfig()
    gateway: GatewayConfig = GatewayConfig()
    dispatcher: DispatcherConfig = DispatcherConfig()
    annotator: AnnotatorConfig = AnnotatorConfig()
    registry: ReplicaConfig = ReplicaConfig()
    denoisers: tuple[DenoiserConfig, ...] = (DenoiserConfig(),)
    safety: SafetyConfig = SafetyConfig()
    compat: CompatConfig = CompatConfig()
    webhooks: WebhookConfig = WebhookConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.denoisers:
            raise ValueError("denoisers: at least one is needed")
        names = [denoiser.name for denoiser in self.denoisers]
        if len(set(names)) != len(names):
            raise ValueError(f"denoisers: names must differ, got {', '.join(names)}")
        if sum(not denoiser.families for denoiser in self.denoisers) > 1:
            raise ValueError("denoisers: only one may leave families empty")
        if self.nodes == "many":
            if self.database_url.startswith("sqlite"):
                raise ValueError("database.url: more than one node needs PostgreSQL, SQLite is one file on one machine")
            if not self.storage.shared:
                raise ValueError("storage.shared: more than one node needs a store that all of them see")
        return self

    def denoiser_for(self, family: str) -> DenoiserConfig:
        """The denoiser that serves a base family.

        Raises:
            UnknownModel: no denoiser is configured for it.
        """
        for denoiser in self.denoisers:
            if family in denoiser.families:
                return denoiser
        for denoiser in self.denoisers:
            if not denoiser.families:
                return denoiser
        served = sorted(family for denoiser in self.denoisers for family in denoiser.families)
        raise UnknownModel(one_of("base family", family, served))

    @property
    def data_folder(self) -> Path:
        return self.data.expanduser().absolute()

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL without its password."""
        return self.database.url or f"sqlite:///{self.data_folder / 'jobs.sqlite3'}"

    @property
    def storage_url(self) -> str:
        return self.storage.url or (self.data_folder / "objects").as_uri()

    @property
    def published_models(self) -> Path:
        return (self.models_folder or self.data_folder / "models").expanduser().absolute()

    @property
    def annotator_weights(self) -> Path:
        return (self.annotator.weights_folder or self.data_folder / "annotators").expanduser().absolute()

    @property
    def public_url(self) -> str:
        return self.server.public_url.rstrip("/")


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


def set_environment(values: Mapping[str, str]) -> None:
    """Set process environment defaults (thread counts, library switches); what is already set wins."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


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
