"""Who this replica process is, and which device is its own."""

import os
from typing import TypeVar

import ray
from ray import serve

from serve_app.config import AnnotatorConfig, DenoiserConfig

OnDevice = TypeVar("OnDevice", AnnotatorConfig, DenoiserConfig)


def replica_name() -> str:
    """Unique over the cluster and over time."""
    context = serve.get_replica_context()
    return f"{context.deployment}-{context.replica_id.unique_id}"


def node_name() -> str:
    return str(ray.get_runtime_context().get_node_id())


def pid() -> int:
    return os.getpid()


def on_its_device(config: OnDevice) -> OnDevice:
    """The configuration with ``auto`` resolved to the CPU for a replica that asked Ray for no GPU.

    Ray leaves every GPU of the node visible to an actor with ``num_gpus: 0``, so torch would see those of others.
    """
    if config.device == "auto" and config.num_gpus == 0:
        return config.model_copy(update={"device": "cpu"})
    return config
