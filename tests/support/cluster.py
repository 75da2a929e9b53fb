"""A served cluster, as a client and as an operator see it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2

from serve_app.backend import BackendStats
from serve_app.config import AppConfig
from serve_app.jobs.job import Job
from serve_app.resources import Resources

KEY = "cluster-tests-key-0123456789"
API = "/api/v1/enterprise"
ENDED = {"success", "failed", "error"}


@dataclass
class Served:
    """The running cluster, as a client and as an operator see it."""

    url: str
    resources: Resources
    cluster: Any
    """``ray.cluster_utils.Cluster``."""
    workers: list[Any]
    http: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx2.Client(base_url=self.url, timeout=90)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Post to the API; a gateway that is being replaced is asked again, as a client would."""
        deadline = time.monotonic() + 90
        while True:
            try:
                answer = self.http.post(f"{API}/{path}", json={"key": KEY, **body})
                if answer.status_code == 200:
                    result: dict[str, Any] = answer.json()
                    return result
            except httpx2.TransportError:
                pass
            assert time.monotonic() < deadline, f"{path} did not answer"
            time.sleep(0.5)

    def submit(self, **fields: object) -> int:
        """Submit without waiting; returns the job's id."""
        answer = self.post("controlnet", {"instant_response": "yes", **fields})
        assert answer["status"] == "processing", answer
        return int(answer["id"])

    def result(self, job_id: int, timeout_s: float = 120) -> dict[str, Any]:
        """Poll ``fetch`` until the job has ended."""
        deadline = time.monotonic() + timeout_s
        while (answer := self.post("fetch", {"request_id": job_id}))["status"] not in ENDED:
            assert time.monotonic() < deadline, f"job {job_id} did not end: {answer}"
            time.sleep(0.2)
        return answer

    def job(self, job_id: int) -> Job:
        """The job's row."""
        job = self.resources.jobs.get(job_id)
        assert job is not None
        return job

    def picture(self, answer: Mapping[str, Any], index: int = 0) -> bytes:
        response = self.http.get(answer["output"][index])
        assert response.status_code == 200
        return response.content

    def stats(self) -> BackendStats:
        answer = self.post("system_details", {})
        return BackendStats(denoisers=answer["denoisers"], annotators=answer["annotators"])

    def wait_for_denoisers(self, count: int, timeout_s: float = 60) -> BackendStats:
        deadline = time.monotonic() + timeout_s
        while len((stats := self.stats()).denoisers) < count:
            assert time.monotonic() < deadline, f"{len(stats.denoisers)} of {count} denoisers answer"
            time.sleep(0.5)
        return stats


def cluster_config(folder: Path, postgres_url: str, port: int) -> AppConfig:
    """Two denoisers with a fake GPU each, computing on the CPU; short leases, for the tests kill their holders."""
    return AppConfig.model_validate(
        {
            "nodes": "many",
            "data": folder,
            "server": {"public_url": f"http://127.0.0.1:{port}", "sync_wait_s": 60},
            "database": {"url": postgres_url},
            "storage": {"url": (folder / "objects").as_uri(), "shared": True},
            "dispatcher": {"lease_s": 4, "graceful_shutdown_timeout_s": 4},
            "gateway": {"graceful_shutdown_timeout_s": 2},
            "annotator": {"graceful_shutdown_timeout_s": 2},
            "registry": {"graceful_shutdown_timeout_s": 2},
            "denoisers": [
                {"replicas": 2, "num_gpus": 1, "device": "cpu", "max_rows": 16, "graceful_shutdown_timeout_s": 4}
            ],
        }
    )
