"""One Ray cluster for all tests that need nodes: a head without replicas, two workers with one fake GPU each.

PostgreSQL and a shared folder behind it, the demo model on it, Serve's own proxy on a free port of 127.0.0.1.
"""

import os
import socket
from collections.abc import Iterator

import pytest

from deployments.environment import environment
from support.cluster import KEY, Served, cluster_config

os.environ.update(
    environment(1)
    | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[Served]:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from serve_app import app
    from serve_app.resources import open_resources

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = cluster_config(tmp_path_factory.mktemp("shared"), postgres_url, port)
    resources = open_resources(config)
    resources.keys.create("tests", "default", ["generate", "admin"], KEY)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=2, num_gpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(app(config), name="controlnet", route_prefix="/")
        with Served(config.public_url, resources, cluster, workers) as running:
            yield running
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
        resources.database.close()
