"""Prometheus metrics of a server. Label values are bounded: served models, stages, reasons, causes."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from de3.exits.kinds import Spans
from de3.runtime.background import errors
from de3.runtime.engine.head import Part
from de3.runtime.engine.job import Job
from de3.runtime.engine.served import Served
from de3.runtime.errors import Cause
from de3.server.audit.auditor import EXCLUDED, UPSTREAM_FAILED, Auditor
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.ledger import tau_row
from de3.server.audit.ledgers import Ledgers
from de3.server.learn.metrics import LearnMetrics
from de3.server.settings import Settings
from de3.server.text_metrics import STAGE_BUCKETS, Tallied, TextMetrics
from de3.server.upstream_metrics import UpstreamMetrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series, and Prometheus does not need them

REQUEST_BUCKETS = tuple(b for b in STAGE_BUCKETS if b >= 0.0004)
# The possible statuses of a request, with a model and without one.
STATUSES = ("200", "422", "429", "499", "500", "502", "503", "504")
WITHOUT_MODEL = ("400", "401", "404", "408", "413", "422", "429", "499", "500", "503", "504")
KEPT_MODELS = 8  # unloaded models whose metrics are kept


class Tally(Collector):
    """A counter in which only the event loop counts: prometheus_client takes five calls and a lock for each value."""

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._what, self._labels, self._values = (name, documentation), labels, dict[tuple[str, ...], float]()
        registry.register(self)

    def add(self, amount: float, *labels: str) -> None:
        """Add to the value with these labels, which begins at 0."""
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def remove(self, model: str) -> None:
        """Forget the values of a model, which is the first label."""
        self._values = {labels: value for labels, value in self._values.items() if labels[0] != model}

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The counter."""
        counter = CounterMetricFamily(*self._what, labels=self._labels)
        for labels, value in list(self._values.items()):
            counter.add_metric(labels, value)
        yield counter


class _Latency(Collector):
    """The latency of requests, by model, counted as in Tally."""

    def __init__(self, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self._bounds, self._models = bounds, dict[str, Tallied]()
        registry.register(self)

    def start(self, model: str) -> None:
        """Start to count a model's requests; keeps the counts if there are any."""
        self._models.setdefault(model, Tallied(self._bounds))

    def add(self, model: str, seconds: float) -> None:
        """Count a request."""
        if model not in self._models:
            self.start(model)
        self._models[model].add((seconds,))

    def remove(self, model: str) -> None:
        """Forget the counts of a model."""
        self._models.pop(model, None)

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """The histogram."""
        latency = HistogramMetricFamily(
            "de3_request_latency_seconds",
            "Time from a request's head to its response (200) or timeout (504)",
            labels=["model"],
        )
        for model, histogram in list(self._models.items()):
            latency.add_metric([model], *histogram.rows())
        yield latency


class _ModelGauges(Collector):
    """Gauges by model that are computed at each scrape instead of for every text."""

    def __init__(self, served: dict[str, Served], level: Callable[[], int]) -> None:
        self._served, self._level = served, level

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """The gauges. Drift is included once its window is full, and accuracy if the model has a calibration."""
        tau = GaugeMetricFamily(
            "de3_tau",
            "τ in force for requests without exit options; raised under load",
            labels=["model"],
        )
        full = GaugeMetricFamily(
            "de3_full_depth_accuracy", "Accuracy at full depth, by the calibration", labels=["model"]
        )
        drift = GaugeMetricFamily(
            "de3_drift",
            "Distance of the distribution of recent texts from the calibration's, by signal at the first exit",
            labels=["model", "signal", "statistic"],
        )
        for name, served in list(self._served.items()):
            tau.add_metric([name], served.rules.in_force(self._level()).rule.tau)
            if served.rules.trade_offs is not None:
                full.add_metric([name], served.rules.trade_offs.rows[0].accuracy)
            if served.monitor.drift is not None:
                for (signal, statistic), value in served.monitor.drift.statistics().items():
                    drift.add_metric([name, signal, statistic], value)
        yield from (tau, full, drift)


class _AuditMetrics(Collector):
    """Metrics of the audits of this process, by model."""

    def __init__(self, served: dict[str, Served], auditor_of: Callable[[Served], Auditor | None]) -> None:
        self._served, self._auditor_of = served, auditor_of

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics of every model that is audited."""
        gauge, counter = partial(GaugeMetricFamily, labels=["model"]), partial(CounterMetricFamily)
        share = gauge(
            "de3_audit_share", "Probability that the next text of a request without exit options is audited"
        )
        pending = gauge("de3_audit_pending_texts", "Audits waiting for idle time")
        texts = counter("de3_audit_texts", "Audited texts", labels=["model"])
        disagreements = counter(
            "de3_audit_disagreements",
            "Audited texts whose answer, as served, differs from full depth",
            labels=["model"],
        )
        seconds = counter("de3_audit_seconds", "Model time of audits", labels=["model"])
        excluded = counter(
            "de3_audit_excluded_texts",
            f"Texts excluded from audits, by reason: {', '.join((*EXCLUDED, UPSTREAM_FAILED))}",
            labels=["model", "reason"],
        )
        for name, served in list(self._served.items()):
            auditor = self._auditor_of(served)
            if auditor is None:
                continue
            share.add_metric([name], auditor.share)
            pending.add_metric([name], auditor.pending)
            texts.add_metric([name], auditor.audits)
            disagreements.add_metric([name], auditor.disagreements)
            seconds.add_metric([name], auditor.seconds)
            for why, count in auditor.excluded.items():
                excluded.add_metric([name, why], count)
        yield from (share, pending, texts, disagreements, seconds, excluded)


class LedgerMetrics(Collector):
    """Audit results of the server, by model."""

    def __init__(self, ledgers: Ledgers, level: Callable[[], int]) -> None:
        """level: returns the load level."""
        self._ledgers, self._level = ledgers, level

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics; measured rates only for models with audits, the guarantee only for models with one."""
        gauge = partial(GaugeMetricFamily, labels=["model"])
        rate = gauge(
            "de3_audit_disagreement",
            "Rate of disagreement with full depth at the τ in force, from the audits since the last reset; with a "
            "guarantee, of the tenant whose audits are the strongest evidence against it",
        )
        lower = gauge(
            "de3_audit_disagreement_lower", "Anytime-valid 95% lower bound on de3_audit_disagreement"
        )
        upper = gauge(
            "de3_audit_disagreement_upper", "Anytime-valid 95% upper bound on de3_audit_disagreement"
        )
        guarantee = gauge(
            "de3_audit_guarantee",
            "Guaranteed rate of disagreement: --guarantee, or --max-disagreement",
        )
        missed = gauge(
            "de3_audit_missed",
            "Share of the texts that full depth flags that leave early as safe at the τ in force, as "
            "de3_audit_disagreement",
        )
        missed_lower = gauge("de3_audit_missed_lower", "Anytime-valid 95% lower bound on de3_audit_missed")
        missed_upper = gauge("de3_audit_missed_upper", "Anytime-valid 95% upper bound on de3_audit_missed")
        missed_guarantee = gauge(
            "de3_audit_missed_guarantee", "Guaranteed de3_audit_missed: --guarantee-missed"
        )
        tau = GaugeMetricFamily(
            "de3_audit_tau",
            "τ in force, by reason: start, evidence, recent, change, reset, no_exits; or the option that set it. With "
            "a guarantee, the median over the tenants",
            labels=["model", "reason"],
        )
        tenants = gauge("de3_audit_tenants", "Tenants with a guarantee that have sent texts")
        lowest = gauge("de3_audit_tau_lowest", "Lowest τ of these tenants")
        highest = gauge("de3_audit_tau_highest", "Highest τ of these tenants")
        resets = CounterMetricFamily(
            "de3_audit_resets",
            "Resets of the audit evidence, by reason: change (the rate at the proved τ rose above the guarantee), "
            "or reset (by an admin)",
            labels=["model", "reason"],
        )
        for ledger in self._ledgers.all:
            choice = ledger.rules.in_force(self._level())
            name, row = ledger.manifest.full_name, tau_row(choice, ledger.manifest)
            for metrics, measured in (
                ((rate, lower, upper), ledger.measured(choice)),
                ((missed, missed_lower, missed_upper), ledger.missed(choice)),
            ):
                for metric, value in zip(metrics, measured or (), strict=bool(measured)):
                    metric.add_metric([name], value)
            for metric, limit in (
                (guarantee, ledger.guaranteed_rate),
                (missed_guarantee, ledger.limits.missed),
            ):
                if limit is not None:
                    metric.add_metric([name], limit)
            tau.add_metric([name, row["reason"]], row["tau"])
            if taus := ledger.tenant_taus():
                for metric, value in ((tenants, len(taus)), (lowest, min(taus)), (highest, max(taus))):
                    metric.add_metric([name], value)
            for reason, count in ledger.num_resets.items():
                resets.add_metric([name, reason], count)
        yield from (rate, lower, upper, guarantee, missed, missed_lower, missed_upper, missed_guarantee)
        yield from (tau, tenants, lowest, highest, resets)


def register_results(
    registry: CollectorRegistry, coordinator: Coordinator, level: Callable[[], int], settings: Settings
) -> None:
    """Register the results of audits, of learning and of upstreams, which are read at each scrape.

    level: returns the load level.
    """
    if settings.upstreams:
        registry.register(UpstreamMetrics(coordinator.upstreams))
    if not settings.share_of_audits:
        return
    registry.register(LedgerMetrics(coordinator.ledgers, level))
    if coordinator.learners is not None:
        registry.register(LearnMetrics(coordinator.learners))


class BackgroundErrors(Collector):
    """Counter of the unexpected errors of this process's background tasks."""

    def collect(self) -> Iterable[CounterMetricFamily]:
        """The counter, by task."""
        counter = CounterMetricFamily(
            "de3_background_errors",
            "Unexpected errors of background tasks, which are logged; the server keeps running",
            labels=["task"],
        )
        for task, count in list(errors.items()):  # rate() needs a 0 before the first error
            counter.add_metric([task], count)
        yield counter


def _info(served: Served) -> tuple[str, ...]:
    manifest = served.model.manifest
    return (served.model.full_name, manifest.precision, served.model.runtime, str(manifest.num_layers))


class Metrics:
    """All metrics of a server, in a separate registry."""

    def __init__(self, settings: Settings, deepest: int, level: Callable[[], int]) -> None:
        """deepest: largest number of layers of any model. level: returns the load level."""
        self.registry = r = CollectorRegistry()
        self.level = level
        ProcessCollector(registry=r)
        r.register(BackgroundErrors())
        counter = partial(Counter, registry=r)
        self.texts = TextMetrics(deepest)
        r.register(self.texts)
        # The objective is a bucket boundary, so that the share of requests within it is exact.
        self.request_latency = _Latency(sorted({*REQUEST_BUCKETS, (settings.slo_p99_ms or 1000) / 1000}), r)
        self.requests = Tally(
            "de3_requests",
            "Classification requests by HTTP status; model is none if the request's model was not found",
            ["model", "status"],
            r,
        )
        self.rejected = counter("de3_rejected", "Rejected requests on all routes, by cause", ["cause"])
        self.engine_failures = counter("de3_engine_failures", "Engine threads that died or are stuck")
        self.dropped_connections = counter(
            "de3_dropped_connections",
            "Connections closed at a limit: connection_limit, or unread (the client does not read its responses)",
            ["reason"],
        )
        self.cut = counter(
            "de3_truncated_texts", "Texts of which a part was not read, by path", ["model", "route"]
        )
        self.degraded = counter("de3_degraded_texts", "Texts answered with a τ raised under load", ["model"])
        self.calibrated = Tally(
            "de3_calibrated_texts", "Texts answered with a τ from the calibration table", ["model"], r
        )
        self.expected_correct = Tally(
            "de3_expected_correct_texts",
            "Expected number of correct texts among de3_calibrated_texts, by the calibration",
            ["model"],
            r,
        )
        self.shadow_texts = counter(
            "de3_shadow_texts", "Texts also run by a shadow model", ["model", "shadow"]
        )
        self.shadow_disagreements = counter(
            "de3_shadow_disagreements", "Texts answered differently by a shadow model", ["model", "shadow"]
        )
        self._model = Gauge(
            "de3_model_info",
            "1 for each served model",
            ["model", "precision", "runtime", "layers"],
            registry=r,
        )
        self._gone: list[str] = []
        self._served: dict[str, Served] = {}
        r.register(_ModelGauges(self._served, level))
        for cause in get_args(Cause):  # rate() needs a 0 before the first event
            self.rejected.labels(cause)
        for reason in ("connection_limit", "unread"):
            self.dropped_connections.labels(reason)
        for status in WITHOUT_MODEL:
            self.requests.add(0, "none", status)
        self._limits(settings)

    def _limits(self, settings: Settings) -> None:
        """Export the version, and the limits that alerts refer to."""
        r = self.registry
        Info("de3", "The server", registry=r).info({"version": version("de3")})
        Gauge("de3_engine_threads", "Engine threads", registry=r).set(settings.engine_threads())
        Gauge("de3_queue_limit_texts", "Limit on texts in flight (--max-queue)", registry=r).set(
            settings.max_queue
        )
        if settings.slo_p99_ms is not None:
            objective = Gauge("de3_latency_objective_seconds", "Latency objective (--slo-p99-ms)", registry=r)
            objective.set(settings.slo_p99_ms / 1000)

    def read_from(
        self,
        queue_length: Callable[[], int],
        is_ready: Callable[[], bool],
        in_flight: Callable[[], int],
    ) -> None:
        """Export gauges whose values are read at each scrape."""
        for name, help_, value in (
            ("de3_in_flight_requests", "Requests in flight", in_flight),
            (
                "de3_ready",
                "1 while the server is ready: all models loaded and warmed up, not draining",
                is_ready,
            ),
            ("de3_queue_texts", "Texts pending in the queue", queue_length),
            ("de3_load_level", "Load level: number of steps by which the default τ is raised", self.level),
        ):
            Gauge(name, help_, registry=self.registry).set_function(value)

    def read_audits(self, auditor_of: Callable[[Served], Auditor | None]) -> None:
        """Export the metrics of audits, which are read at each scrape."""
        self.registry.register(_AuditMetrics(self._served, auditor_of))

    def add(self, served: Served) -> None:
        """Start counting for a model, or continue with the metrics that were kept when it was unloaded."""
        name = served.model.full_name
        if name in self._served:  # reloaded, perhaps with another runtime
            self.drop(self._served[name])
        self._model.labels(*_info(served)).set(1)
        for status in STATUSES:  # rate() needs a 0 before the first event
            self.requests.add(0, name, status)
        for tally in (self.calibrated, self.expected_correct):
            tally.add(0, name)
        self.request_latency.start(name)
        self.degraded.labels(name)
        kind = served.model.manifest.kind
        spans = kind.rule.names if isinstance(kind, Spans) else []
        self.texts.add_model(name, served.model.manifest.upstream is not None, spans)
        self._served[name] = served
        if name in self._gone:
            self._gone.remove(name)

    def drop(self, served: Served) -> None:
        """Remove an unloaded model; the metrics of the last KEPT_MODELS unloaded models are kept."""
        name = served.model.full_name
        if self._served.get(name) is served:
            del self._served[name]
            self._model.remove(*_info(served))
            self._gone.append(name)
        while len(self._gone) > KEPT_MODELS:
            oldest = self._gone.pop(0)
            for one in (self.requests, self.calibrated, self.expected_correct, self.request_latency):
                one.remove(oldest)
            for metric in (self.degraded, self.cut, self.shadow_texts, self.shadow_disagreements):
                metric.remove_by_labels({"model": oldest})
            for metric in (self.shadow_texts, self.shadow_disagreements):
                metric.remove_by_labels({"shadow": oldest})
            self.texts.drop_model(oldest)

    def answered(self, part: Part) -> None:
        """Count the texts of an answered request in the metrics that depend on the choice of τ, and their spans."""
        choice, model = part.choice, part.model.full_name
        if isinstance(choice.rule.kind, Spans):
            self.texts.count_spans(part)
        if choice.is_degraded:
            self.degraded.labels(model).inc(len(part.heads))
        if choice.expected is not None:
            # The calibration does not cover deadlines, an upstream that is away, a τ lowered for out-of-distribution
            # texts, or several windows.
            others = ("deadline", "upstream_failed")
            texts = sum(
                outcome.rule.tau == choice.rule.tau and outcome.reason not in others and not outcome.windows
                for outcome in part.outcomes()
            )
            self.calibrated.add(texts, model)
            self.expected_correct.add(texts * choice.expected.accuracy, model)

    def truncated(self, job: Job, route: str) -> None:
        """Count an answered request's texts of which a part was not read. route: template of its path."""
        for one in job.parts:
            if count := sum(outcome.truncated for outcome in one.outcomes()):
                self.cut.labels(one.model.full_name, route).inc(count)

    def responded(self, models: Sequence[str], status: int, cause: Cause | None, latency_s: float) -> None:
        """Count a request by its response, for each model. The latency is recorded only for answers and timeouts.

        models: "none" if the request's model was not found. cause: reason for an error; None if there was none.
        """
        if cause is not None:
            self.rejected.labels(cause).inc()
        for model in models:
            self.requests.add(1, model, str(status))
            if status in (200, 504):  # rejections are fast, and would distort the latency
                self.request_latency.add(model, latency_s)
