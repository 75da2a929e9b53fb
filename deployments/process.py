"""What every replica process does first: thread counts, offline switches, its name and its node."""

import os
import socket

import ray
from ray import serve

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def environment(threads: int) -> dict[str, str]:
    """Environment of a replica process.

    OpenMP threads that spin while they wait turned a step of 80 ms into 2,550 ms beside a busy process: PASSIVE puts
    them to sleep. Hub look-ups and remote code are off: models come from the catalogue only.
    """
    variables = dict.fromkeys(THREAD_VARIABLES, str(threads))
    return variables | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def replica_name() -> str:
    """Unique over the cluster and over time."""
    context = serve.get_replica_context()
    return f"{context.deployment}-{context.replica_id.unique_id}"


def node_name() -> str:
    return str(ray.get_runtime_context().get_node_id()) or socket.gethostname()


def pid() -> int:
    return os.getpid()
