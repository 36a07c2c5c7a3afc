"""Prometheus metrics of a server.

Labels are routes, models, statuses and stages, of which there are few; never anything that a client chooses.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gte_deploy.serving.facts import Facts

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        """Make them, in a registry of their own."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gte_deploy_requests", "Requests that were answered.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "gte_deploy_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stages = Histogram(
            "gte_deploy_stage_seconds",
            "Time of a request in one stage: read, parse, compute (with queue and engine in it), write.",
            ("route", "stage"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._inputs = Counter(
            "gte_deploy_inputs", "Texts and pairs in answered requests.", ("route", "model"), registry=self.registry
        )
        self.in_work = Gauge("gte_deploy_requests_in_work", "Requests in work.", registry=self.registry)
        self._tokens = Counter(
            "gte_deploy_tokens", "Tokens that were computed, without padding.", ("model",), registry=self.registry
        )
        self._padding = Counter(
            "gte_deploy_padding_tokens", "Padding that was computed beside tokens.", ("model",), registry=self.registry
        )
        self._batch_rows = self._of_batches("gte_deploy_batch_rows", "Rows of a batch.", _ROWS)
        self._batch_tokens = self._of_batches("gte_deploy_batch_tokens", "Tokens of a batch, with padding.", _TOKENS)
        self._batch_seconds = self._of_batches("gte_deploy_batch_seconds", "Time of a batch in the engine.", _SECONDS)
        ProcessCollector(registry=self.registry)

    def answered(self, facts: Facts, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(facts.route, str(status)).inc()
        self._seconds.labels(facts.route).observe(seconds)
        for stage, duration in facts.seconds().items():
            self._stages.labels(facts.route, stage).observe(duration)
        if facts.inputs and status == 200:
            self._inputs.labels(facts.route, facts.model).inc(facts.inputs)

    def batches_of(self, model: str) -> "BatchMetrics":
        """Return what counts the batches of a model."""
        return BatchMetrics(
            self._tokens.labels(model),
            self._padding.labels(model),
            self._batch_rows.labels(model),
            self._batch_tokens.labels(model),
            self._batch_seconds.labels(model),
        )

    def watch(self, name: str, help: str, read: Callable[[], dict[str, float]]) -> None:
        """Add a gauge whose values, by the names of models, are read when the metrics are."""
        self.registry.register(_Read(name, help, read))

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the form that an Accept header asks for, and the content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _of_batches(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help, ("model",), buckets=buckets, registry=self.registry)


@dataclass(frozen=True)
class BatchMetrics:
    """Counts the batches of one model: a `BatchObserver`."""

    _tokens: Counter
    _padding: Counter
    _rows: Histogram
    _padded_tokens: Histogram
    _seconds: Histogram

    def on_batch(self, rows: int, tokens: int, padded_tokens: int, seconds: float) -> None:
        """Count a batch: its rows, its tokens without and with padding, and the engine's time for it."""
        self._tokens.inc(tokens)
        self._padding.inc(padded_tokens - tokens)
        self._rows.observe(rows)
        self._padded_tokens.observe(padded_tokens)
        self._seconds.observe(seconds)


class _Read(Collector):
    def __init__(self, name: str, help: str, read: Callable[[], dict[str, float]]) -> None:
        self._name, self._help, self._values = name, help, read

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._help, labels=("model",))
        for model, value in self._values().items():
            family.add_metric((model,), value)
        yield family
