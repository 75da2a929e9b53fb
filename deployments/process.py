"""Who this replica process is."""

import os

import ray
from ray import serve


def replica_name() -> str:
    """Unique over the cluster and over time."""
    context = serve.get_replica_context()
    return f"{context.deployment}-{context.replica_id.unique_id}"


def node_name() -> str:
    return str(ray.get_runtime_context().get_node_id())


def pid() -> int:
    return os.getpid()
