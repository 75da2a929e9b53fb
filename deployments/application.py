"""The graph on one screen: who calls whom, and what each replica may use."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.annotator import Annotator
from deployments.denoiser import Denoiser
from deployments.dispatcher import Dispatcher
from deployments.environment import KEEP_HEAP, environment
from deployments.gateway import Gateway
from deployments.registry import Registry
from deployments.routing import GroupRouter
from serve_app.config import AppConfig, ReplicaConfig

NOTHING: Mapping[str, str] = MappingProxyType({})

QUEUED_PER_PLACE = 2
"""Calls that wait at one dispatcher for each call that an annotator replica takes at once. What exceeds it is refused:
its job goes back to the queue, uncharged, and lets jobs that need no annotator have its place."""

HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}


def build(config: AppConfig) -> Application:
    """Bind the application. May run in a Ray task and again at every deploy, so it only binds."""
    annotator = serve.deployment(
        Annotator,
        name="Annotator",
        max_queued_requests=QUEUED_PER_PLACE * config.annotator.max_ongoing,
        **_options(config.annotator),
    ).bind(config)
    denoisers = {
        own.name: serve.deployment(
            Denoiser,
            name=own.name,
            request_router_config=RequestRouterConfig(request_router_class=GroupRouter),
            **_options(own, KEEP_HEAP),
        ).bind(config, own.name)
        for own in config.denoisers
    }
    registry = serve.deployment(Registry, name="Registry", **_options(config.registry)).bind(config)
    dispatcher = serve.deployment(Dispatcher, name="Dispatcher", **_options(config.dispatcher)).bind(
        config, annotator, denoisers
    )
    return serve.deployment(Gateway, name="Gateway", **_options(config.gateway)).bind(
        config, dispatcher, registry, annotator, denoisers
    )


def _options(replica: ReplicaConfig, more_environment: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """Options every deployment shares. Serve's default of one CPU each would not fit on a small machine."""
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": replica.num_cpus,
            "num_gpus": replica.num_gpus,
            "runtime_env": {"env_vars": environment(replica.threads) | dict(more_environment)},
        },
        "max_ongoing_requests": replica.calls_at_once,
        "graceful_shutdown_timeout_s": replica.graceful_shutdown_timeout_s,
        **HEALTH,
    }
    if replica.scaling is None:
        return options | {"num_replicas": replica.replicas}
    return options | {"autoscaling_config": replica.scaling.model_dump(exclude_none=True)}
