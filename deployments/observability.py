"""RayMeter: our metrics through Ray's metrics agent, which Prometheus scrapes on every node."""

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.metrics import METRICS


class RayMeter:
    """See ``serve_app.metrics.Meter``. Metrics are made at first use: an unused one costs nothing."""

    def __init__(self) -> None:
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        self._metric(name).inc(amount, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        self._metric(name).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._metric(name).observe(value, tags=labels)

    def _metric(self, name: str) -> Counter | Gauge | Histogram:
        if name not in self._metrics:
            spec = METRICS[name]
            full = f"controlnet_{name}"
            if spec.kind == "counter":
                metric = Counter(full, spec.help, tag_keys=spec.labels)
            elif spec.kind == "gauge":
                metric = Gauge(full, spec.help, tag_keys=spec.labels)
            else:
                metric = Histogram(full, spec.help, boundaries=list(spec.buckets), tag_keys=spec.labels)
            self._metrics[name] = metric
        return self._metrics[name]
