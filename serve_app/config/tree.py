"""The whole tree, and what follows from several of its sections."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from serve_app.config.replicas import AnnotatorConfig, DenoiserConfig, DispatcherConfig, GatewayConfig, ReplicaConfig
from serve_app.config.sections import (
    CompatConfig,
    DatabaseConfig,
    FetchConfig,
    ImageLimits,
    LimitsConfig,
    ModelSource,
    PromptsConfig,
    SafetyConfig,
    Section,
    ServerConfig,
    StorageConfig,
    WebhookConfig,
)
from serve_app.errors import UnknownModel, one_of


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
