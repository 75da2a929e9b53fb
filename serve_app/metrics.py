"""METRICS: every metric this project reports: name, kind, unit, labels, help.

Code records through the ``Meter`` it is given; what stands behind it (Prometheus client here, Ray's metrics agent in
``deployments.observability``) is chosen at the entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class MetricSpec:
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()


METRICS: Mapping[str, MetricSpec] = {
    "unet_forwards": MetricSpec("counter", "UNet forward calls", ("model",)),
    "unet_rows": MetricSpec("counter", "Rows in UNet forward calls; divided by forwards: mean batch size", ("model",)),
    "controlnet_forwards": MetricSpec("counter", "ControlNet forward calls", ("net",)),
    "requests_running": MetricSpec("gauge", "Requests that hold engine state"),
    "requests_waiting": MetricSpec("gauge", "Requests that wait for engine state"),
    "annotations": MetricSpec("counter", "Control maps handed out, made or cached", ("control_type",)),
    "annotator_runs": MetricSpec("counter", "Control maps really made", ("annotator",)),
    "annotator_seconds": MetricSpec(
        "histogram",
        "Seconds to make a control map, loading included",
        ("annotator",),
        (0.01, 0.05, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
    ),
    "map_cache": MetricSpec(
        "counter", "Control maps asked for: made, joined (another request made it), memory, shared, off", ("outcome",)
    ),
    "map_cache_bytes": MetricSpec("gauge", "Control maps in the object store, of all replicas together"),
    "jobs_ended": MetricSpec("counter", "Jobs that ended", ("status",)),
    "job_seconds": MetricSpec(
        "histogram",
        "Seconds from acceptance to the end of a job",
        ("status",),
        (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300),
    ),
    "jobs_retried": MetricSpec("counter", "Attempts that were lost and are run again", ("reason",)),
    "webhooks": MetricSpec("counter", "Webhook deliveries tried", ("outcome",)),
}


class Meter(Protocol):
    def count(self, name: str, amount: float = 1, **labels: str) -> None: ...

    def set(self, name: str, value: float, **labels: str) -> None: ...

    def observe(self, name: str, value: float, **labels: str) -> None: ...


class PrometheusMeter:
    """A Meter of this process; ``registry`` can be scraped or read."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for name, spec in METRICS.items():
            full = f"controlnet_{name}"
            if spec.kind == "counter":
                self._metrics[name] = Counter(full, spec.help, spec.labels, registry=self.registry)
            elif spec.kind == "gauge":
                self._metrics[name] = Gauge(full, spec.help, spec.labels, registry=self.registry)
            else:
                self._metrics[name] = Histogram(
                    full, spec.help, spec.labels, registry=self.registry, buckets=tuple(spec.buckets)
                )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        cast(Counter, self._child(name, labels)).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        cast(Gauge, self._child(name, labels)).set(value)

    def observe(self, name: str, value: float, **labels: str) -> None:
        cast(Histogram, self._child(name, labels)).observe(value)

    def _child(self, name: str, labels: Mapping[str, str]) -> Counter | Gauge | Histogram:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric
