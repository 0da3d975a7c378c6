"""Prometheus metrics of upstreams."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from de3.runtime.upstream.upstreams import Upstreams


class UpstreamMetrics(Collector):
    """The metrics of upstreams, by model name."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics."""
        share = GaugeMetricFamily(
            "de3_local_share",
            "Share of the texts of the last 5 minutes that the model answered, without its upstream",
            labels=["model"],
        )
        available = GaugeMetricFamily(
            "de3_upstream_available",
            "1 unless calls are paused after failures, or max_calls_per_hour is reached",
            labels=["model"],
        )
        latency = GaugeMetricFamily(
            "de3_upstream_latency_seconds", "Median latency of the last calls", labels=["model"]
        )
        calls = CounterMetricFamily(
            "de3_upstream_calls",
            "Calls of the upstream, by kind: learning, uncertain, audit, repeat or retry",
            labels=["model", "kind"],
        )
        failures = CounterMetricFamily(
            "de3_upstream_failures", "Failed calls of the upstream, by reason", labels=["model", "reason"]
        )
        local = CounterMetricFamily("de3_local_texts", "Texts that the model answered", labels=["model"])
        extracted = CounterMetricFamily(
            "de3_upstream_extracted",
            "Replies in which the label was found among other words",
            labels=["model"],
        )
        cost = CounterMetricFamily(
            "de3_upstream_cost", "Price of the calls, in the currency of the settings", labels=["model"]
        )
        saved = GaugeMetricFamily(
            "de3_upstream_saved", "Estimated price of the calls that local answers saved", labels=["model"]
        )
        for name, caller in self._upstreams.all.items():
            usage, totals = caller.usage, caller.usage.totals
            for gauge, value in (
                (share, usage.local_share),
                (available, float(caller.is_available)),
                (latency, usage.usual_s()),
                (local, totals.local),
                (extracted, totals.extracted),
                (cost, totals.cost),
                (saved, usage.saved),
            ):
                gauge.add_metric([name], value)
            for kind, count in totals.calls.items():
                calls.add_metric([name, kind], count)
            for why, count in totals.failures.items():
                failures.add_metric([name, why], count)
        yield from (share, available, latency, calls, failures, local, extracted, cost, saved)
