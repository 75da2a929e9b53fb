"""The configuration: one frozen tree, read once at the entry, handed down in sections.

``reading`` is the only module that reads YAML or the environment. Unknown keys are refused. Secrets are never values
here: a field that ends in ``_env`` holds the *name* of an environment variable, because whatever Ray Serve deploys can
be read in its dashboard.
"""

from serve_app.config.reading import LaunchSettings, launch_settings, load_config, secret, set_environment
from serve_app.config.replicas import (
    AnnotatorConfig,
    AutoscalingConfig,
    DenoiserConfig,
    DispatcherConfig,
    GatewayConfig,
    ReplicaConfig,
)
from serve_app.config.sections import (
    CompatConfig,
    Count,
    DatabaseConfig,
    FetchConfig,
    ImageLimits,
    LimitsConfig,
    ModelId,
    ModelSource,
    Port,
    PromptsConfig,
    SafetyConfig,
    Seconds,
    Section,
    ServerConfig,
    SizeLimits,
    StorageConfig,
    WebhookConfig,
)
from serve_app.config.tree import AppConfig

__all__ = [
    "AnnotatorConfig",
    "AppConfig",
    "AutoscalingConfig",
    "CompatConfig",
    "Count",
    "DatabaseConfig",
    "DenoiserConfig",
    "DispatcherConfig",
    "FetchConfig",
    "GatewayConfig",
    "ImageLimits",
    "LaunchSettings",
    "LimitsConfig",
    "ModelId",
    "ModelSource",
    "Port",
    "PromptsConfig",
    "ReplicaConfig",
    "SafetyConfig",
    "Seconds",
    "Section",
    "ServerConfig",
    "SizeLimits",
    "StorageConfig",
    "WebhookConfig",
    "launch_settings",
    "load_config",
    "secret",
    "set_environment",
]
