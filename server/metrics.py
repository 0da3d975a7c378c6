"""Prometheus metrics of one server. Label values are bounded: served models, stages, reasons, causes."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from model_store.model import Model
from server.watch import Drift
from server.work import Outcome

STAGE_BUCKETS = (
    *(0.00005, 0.0001, 0.0002, 0.0004, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
REQUEST_BUCKETS = tuple(b for b in STAGE_BUCKETS if b >= 0.0004)


class _DriftCollector(Collector):
    """Drift is worked out when it is asked for, not with every text."""

    def __init__(self, drifts: dict[str, Drift]) -> None:
        self._drifts = drifts

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """One gauge; no values for a model whose window is not full yet."""
        gauge = GaugeMetricFamily(
            "de3_drift",
            "How the last texts differ from calibration, by signal of the first exit; 0: not at all",
            labels=["model", "signal", "statistic"],
        )
        for model, drift in self._drifts.items():
            for (signal, statistic), value in drift.statistics().items():
                gauge.add_metric([model, signal, statistic], value)
        yield gauge


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self, deepest: int) -> None:
        """`deepest`: the most layers that a served model has."""
        self.registry = r = CollectorRegistry()
        self.exit_layer = Histogram(
            "de3_exit_layer",
            "Layer at which a text left (0: embeddings)",
            ["model"],
            buckets=[float(m) for m in range(deepest + 1)],
            registry=r,
        )
        self.exits = Counter(
            "de3_exits", "Texts by the reason for which they left", ["model", "reason"], registry=r
        )
        self.layers_run = Counter("de3_layers_run", "Encoder layers executed", ["model"], registry=r)
        self.layers_saved = Counter(
            "de3_layers_saved", "Encoder layers that leaving early saved", ["model"], registry=r
        )
        self.tokens = Counter("de3_tokens", "Tokens of the texts that left", ["model"], registry=r)
        self.request_latency = Histogram(
            "de3_request_latency_seconds",
            "From a request's head to its answer",
            ["model"],
            buckets=REQUEST_BUCKETS,
            registry=r,
        )
        self.stage_latency = Histogram(
            "de3_stage_latency_seconds",
            "Time of one text in a stage: queue, tokenize, model",
            ["model", "stage"],
            buckets=STAGE_BUCKETS,
            registry=r,
        )
        self.requests = Counter(
            "de3_requests",
            "Answers to /classify by HTTP status; model is none where no model was found",
            ["model", "status"],
            registry=r,
        )
        self.rejected = Counter("de3_rejected", "Requests not answered, by cause", ["cause"], registry=r)
        self._in_flight = Gauge("de3_in_flight_requests", "Requests being answered", registry=r)
        self._ready = Gauge("de3_ready", "1 once every model is loaded and warmed up", registry=r)
        self._queue = Gauge("de3_queue_texts", "Texts waiting for an engine thread", registry=r)
        self.far = Counter(
            "de3_far_texts", "Texts far from every prototype at an exit (--ood-policy)", ["model"], registry=r
        )
        self.degraded = Counter(
            "de3_degraded_texts", "Texts answered with a τ that was raised under load", ["model"], registry=r
        )
        self._tau = Gauge(
            "de3_tau", "τ in force for requests that name none, raised under load", ["model"], registry=r
        )
        self._observers: dict[str, Callable[[Outcome], None]] = {}

    def watch(
        self, queue_length: Callable[[], int], is_ready: Callable[[], bool], in_flight: Callable[[], int]
    ) -> None:
        """Read these whenever the metrics are scraped."""
        self._queue.set_function(queue_length)
        self._ready.set_function(is_ready)
        self._in_flight.set_function(in_flight)

    def watch_rules(self, taus: dict[str, Callable[[], float]]) -> None:
        """Read the τ in force whenever the metrics are scraped; by model."""
        for model, tau in taus.items():
            self._tau.labels(model).set_function(tau)

    def watch_drift(self, drifts: dict[str, Drift]) -> None:
        """Read these whenever the metrics are scraped; by model."""
        self.registry.register(_DriftCollector(drifts))

    def observe(self, model: Model, outcome: Outcome) -> None:
        """Count one text that left; called by engine threads."""
        observer = self._observers.get(model.full_name)
        if observer is None:
            observer = self._observers[model.full_name] = self._observer(model)
        observer(outcome)

    def _observer(self, model: Model) -> Callable[[Outcome], None]:
        """A function with the label look-ups of one model done once."""
        name, depth = model.full_name, model.manifest.num_layers
        layer = self.exit_layer.labels(name)
        reasons = {
            r: self.exits.labels(name, r) for r in ("threshold", "last_layer", "max_layer", "deadline")
        }
        stages = [self.stage_latency.labels(name, s) for s in ("queue", "tokenize", "model")]
        counters = (self.layers_run, self.layers_saved, self.tokens, self.far)
        run, saved, tokens, far = (c.labels(name) for c in counters)

        def observe(o: Outcome) -> None:
            layer.observe(o.layer)
            reasons[o.reason].inc()
            run.inc(o.layer)
            saved.inc(depth - o.layer)
            tokens.inc(o.tokens)
            if o.is_far:
                far.inc()
            for stage, seconds in zip(stages, (o.queue_s, o.tokenize_s, o.model_s), strict=True):
                stage.observe(seconds)

        return observe
