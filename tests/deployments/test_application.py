"""The graph: what is bound for each shipped configuration. Nothing runs."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app

import serve_app
from serve_app.config import AppConfig, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "configs").glob("*.yaml"))


def deployments(config: AppConfig) -> dict[str, Any]:
    built = build_app(serve_app.app(config), name="controlnet", default_runtime_env={})
    return {deployment.name: deployment for deployment in built.deployments}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_deployment_says_what_it_takes(path: Path) -> None:
    config = load_config(path)
    found = deployments(config)
    assert set(found) == {"Gateway", "Dispatcher", "Annotator", "Registry", *(own.name for own in config.denoisers)}
    for deployment in found.values():
        options = deployment.ray_actor_options
        assert options["runtime_env"]["env_vars"]["OMP_WAIT_POLICY"] == "PASSIVE"
        assert int(options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]) >= 1
        # Serve's default of 5 would let five waiting clients block a gateway.
        assert deployment.max_ongoing_requests >= (1000 if deployment.name in {"Gateway", "Dispatcher"} else 1)
    for own in config.denoisers:
        assert found[own.name].ray_actor_options["num_gpus"] == own.num_gpus
        assert found[own.name].max_ongoing_requests == own.max_running + own.waiting_room


def test_the_demo_fits_on_two_cores() -> None:
    found = deployments(AppConfig())
    assert sum(deployment.ray_actor_options["num_cpus"] for deployment in found.values()) <= 2


def test_replicas_and_autoscaling_come_from_the_configuration() -> None:
    scaling = {"min_replicas": 1, "max_replicas": 5, "target_ongoing_requests": 3}
    config = AppConfig.model_validate(
        {
            "denoisers": [
                {"name": "A", "replicas": 3},
                {"name": "B", "families": ["sdxl"], "autoscaling_config": scaling},
            ]
        }
    )
    found = deployments(config)
    assert found["A"].num_replicas == 3
    autoscaling = found["B"]._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas, autoscaling.target_ongoing_requests) == (1, 5, 3)


def test_annotators_scale_apart_on_a_share_of_a_gpu() -> None:
    scaling = {"min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 2}
    annotator = {"num_gpus": 0.25, "device": "cuda", "max_ongoing": 3, "threads": 2, "autoscaling_config": scaling}
    found = deployments(AppConfig.model_validate({"annotator": annotator, "denoisers": [{"replicas": 4}]}))
    own = found["Annotator"]
    autoscaling = own._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas, autoscaling.target_ongoing_requests) == (2, 6, 2)
    assert own.ray_actor_options["num_gpus"] == 0.25
    assert own.ray_actor_options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    assert (own.max_ongoing_requests, own._deployment_config.max_queued_requests) == (3, 6)
    assert found["Denoiser"].num_replicas == 4


def test_what_nobody_sets_scales_before_calls_wait() -> None:
    scaling = {"autoscaling_config": {"max_replicas": 4}}
    sections = ("annotator", "gateway", "dispatcher", "registry")
    config = AppConfig.model_validate(dict.fromkeys(sections, scaling) | {"denoisers": [scaling]})
    for deployment in deployments(config).values():
        target = deployment._deployment_config.autoscaling_config.target_ongoing_requests
        # An annotator replica runs one network at a time, however many calls it takes.
        assert target == (2 if deployment.name == "Annotator" else deployment.max_ongoing_requests / 2)
