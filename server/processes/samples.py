"""Merges the metrics of several processes into those of one server."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from de3.server.processes.messages import decode

# How the values of a gauge in several processes are merged; counters and histograms are always added up.
MAXIMA = {
    "de3_tau",
    "de3_full_depth_accuracy",
    "de3_int8_disagreement_ratio",
    "de3_drift",
    "de3_audit_share",
    "de3_model_info",
    "de3",
    "de3_latency_objective_seconds",
    "de3_load_level",
    "de3_ready",
    "process_max_fds",
}
MINIMA = {"process_start_time_seconds"}
SUMS = {
    "de3_audit_pending_texts",
    "de3_engine_threads",
    "de3_in_flight_requests",
    "de3_queue_limit_texts",
    "de3_queue_texts",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
}
GROWING = ("counter", "histogram", "summary")


@dataclass
class Family:
    """A metric and its samples, in a form that can be sent as JSON.

    Attributes:
        samples: name, labels and value of each sample.
    """

    name: str
    help: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]]


def families_of(registry: CollectorRegistry) -> list[Family]:
    """The metrics of a registry."""
    return [
        Family(m.name, m.documentation, m.type, [(s.name, s.labels, s.value) for s in m.samples])
        for m in registry.collect()
    ]


def merged(processes: Iterable[Sequence[Family]]) -> list[Family]:
    """One family for each metric of the processes; samples with the same name and labels are merged."""
    families: dict[str, Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for process in processes:
        for family in process:
            families.setdefault(family.name, family)
            found = values.setdefault(family.name, {})
            for name, labels, value in family.samples:
                key = name, tuple(labels.items())
                found[key] = value if key not in found else _both(family, found[key], value)
    return [
        Family(
            name, family.help, family.kind, [(n, dict(labels), v) for (n, labels), v in values[name].items()]
        )
        for name, family in families.items()
    ]


def _both(family: Family, a: float, b: float) -> float:
    name = family.name
    if family.kind in GROWING or name in SUMS:
        return a + b
    return min(a, b) if name in MINIMA else max(a, b)


def growing(process: Sequence[Family]) -> list[Family]:
    """The counters and histograms of a process, which stay in the server's totals after it has ended."""
    return [family for family in process if family.kind in GROWING]


class _Merged(Collector):
    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.kind)
            metric.samples = [Sample(name, labels, value) for name, labels, value in family.samples]
            yield metric


def text_of(families: Sequence[Family]) -> bytes:
    """Metrics in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Merged(families))
    return generate_latest(registry)


def families_from(rows: Sequence[dict[str, Any]]) -> list[Family]:
    """The metrics in parsed JSON, where null stands for NaN."""
    families = decode(list[Family], rows)
    for one in families:
        one.samples = [(name, labels, nan if value is None else value) for name, labels, value in one.samples]
    return families
