"""Metrics of finished texts, counted in one step for the texts that finish together.

prometheus_client acquires a lock for each value, which takes a microsecond. For the dozen values of a text, that would
take as long as an early exit.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from threading import Lock
from typing import NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from de3.exits.rule import ExitReason
from de3.runtime.engine.head import Part
from de3.runtime.engine.outcome import Outcome
from de3.runtime.engine.served import Served

# Seconds, from an exit at the embeddings to the timeout; finest where most texts are.
STAGE_BUCKETS = (
    *(0.00005, 0.0001, 0.0002, 0.0004, 0.0007, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
# Texts exit when the signals are small, so values cluster near 0.
SIGNAL_BUCKETS = (0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
STAGES = ("queue", "tokenize", "model")
MAX_ROWS = 256  # texts of a model that are counted together
MAX_SPAN_LABELS, OTHER = (
    100,
    "other",
)  # labels of a model's spans that are counted on their own; the rest together


class Tallied:
    """A histogram: counts of values by bucket, and the sum of the values."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, values: Iterable[float]) -> None:
        """Count values."""
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            self.sum += value

    def rows(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, in the form that Prometheus expects, and the sum of all values."""
        bounds, totals = [*map(str, self.bounds), "+Inf"], map(float, accumulate(self.counts))
        return list(zip(bounds, totals, strict=True)), self.sum


class _Row(NamedTuple):
    """The values of one text that are counted."""

    reason: ExitReason
    layer: int
    entropy: float | None
    ratio: float | None
    queue_s: float
    tokenize_s: float
    model_s: float


class _Texts:
    """The counts of one model; those of its latest texts are added up by fold()."""

    def __init__(self, layers: Sequence[float], has_upstream: bool, span_labels: Sequence[str]) -> None:
        reasons = [one for one in get_args(ExitReason) if has_upstream or not one.startswith("upstream")]
        self.exits = {reason: Tallied(layers) for reason in reasons}
        self.run = self.saved = self.tokens = self.far = self.flagged = 0
        self.full_depth_s = 0.0
        self.spans = dict.fromkeys([*span_labels[:MAX_SPAN_LABELS], OTHER] if span_labels else [], 0)
        self.entropy, self.ratio = Tallied(SIGNAL_BUCKETS), Tallied(SIGNAL_BUCKETS)
        self.queue, self.tokenize, self.model = (Tallied(STAGE_BUCKETS) for _ in STAGES)
        self._rows: list[_Row] = []

    def add(self, outcome: Outcome, depth: int, speedup: Callable[[int, int], float]) -> None:
        """Count a text. depth: number of layers. speedup: see Timing.speedup."""
        for part in outcome.windows or (outcome,):
            self.run += part.layer
            self.saved += depth - part.layer
            self.full_depth_s += part.model_s * speedup(part.tokens, part.layer)
        self.tokens += outcome.tokens
        self.far += outcome.is_far
        self.flagged += outcome.rule.flag is not None and outcome.rule.flag.is_raised(outcome.reading)
        reading = outcome.reading
        signals = reading.entropy, reading.distance_ratio
        times = outcome.queue_s, outcome.tokenize_s, outcome.model_s
        self._rows.append(_Row(outcome.reason, outcome.layer, *signals, *times))
        if len(self._rows) >= MAX_ROWS:
            self.fold()

    def fold(self) -> None:
        """Add up the rows: for many texts at once, this takes a fraction of the time."""
        rows, self._rows = self._rows, []
        for reason, exits in self.exits.items():
            exits.add([row.layer for row in rows if row.reason == reason])
        self.entropy.add([row.entropy for row in rows if row.entropy is not None])
        self.ratio.add([row.ratio for row in rows if row.ratio is not None])
        self.queue.add([row.queue_s for row in rows])
        self.tokenize.add([row.tokenize_s for row in rows])
        self.model.add([row.model_s for row in rows])


class TextMetrics(Collector):
    """The counts of all models, by name."""

    def __init__(self, deepest: int) -> None:
        """deepest: largest number of layers of any model."""
        self._layers = [float(m) for m in range(deepest + 1)]
        self._texts: dict[str, _Texts] = {}
        self._lock = Lock()

    def add_model(self, name: str, has_upstream: bool = False, span_labels: Sequence[str] = ()) -> None:
        """Start counting a model's texts; keeps the counts if there are any. span_labels: of a token classifier."""
        with self._lock:
            self._texts.setdefault(name, _Texts(self._layers, has_upstream, span_labels))

    def drop_model(self, name: str) -> None:
        """Forget the counts of a model."""
        with self._lock:
            self._texts.pop(name, None)

    def observe(self, served: Served, outcomes: Sequence[Outcome]) -> None:
        """Count finished texts of a model, unless its upstream may still answer them; called by engine threads."""
        if served.model.manifest.upstream is None:
            self.count(served, outcomes)

    def count(self, served: Served, outcomes: Sequence[Outcome]) -> None:
        """Count answered texts of a model."""
        depth, speedup = served.model.manifest.num_layers, served.timing.speedup
        with self._lock:
            texts = self._texts.get(served.model.full_name)
            if texts is not None:  # the model may have been removed while its texts were in flight
                for outcome in outcomes:
                    texts.add(outcome, depth, speedup)

    def count_spans(self, part: Part) -> None:
        """Count the spans of an answered job's texts, which are made here, once for the answer, too."""
        found = Counter(span.label for outcome in part.outcomes() for span in outcome.reading.spans)
        with self._lock:
            texts = self._texts.get(part.model.full_name)
            if texts is None:
                return
            for label, count in found.items():
                texts.spans[label if label in texts.spans else OTHER] += count

    def collect(self) -> Iterable[CounterMetricFamily | HistogramMetricFamily]:
        """The metrics of every model."""
        exits = HistogramMetricFamily(
            "de3_exit_layer",
            "Exit layer of each text (0: embeddings), by reason; with several windows, that of the last one that ran",
            labels=["model", "reason"],
        )
        run = CounterMetricFamily("de3_layers_run", "Encoder layers executed", labels=["model"])
        saved = CounterMetricFamily(
            "de3_layers_saved", "Encoder layers saved by early exits", labels=["model"]
        )
        full_depth = CounterMetricFamily(
            "de3_full_depth_seconds",
            "Estimated model time at full depth: measured model time, scaled by times per layer measured at loading",
            labels=["model"],
        )
        tokens = CounterMetricFamily("de3_tokens", "Tokens of finished texts", labels=["model"])
        entropy = HistogramMetricFamily(
            "de3_exit_entropy", "Entropy at the exit of each text", labels=["model"]
        )
        ratio = HistogramMetricFamily(
            "de3_exit_distance_ratio",
            "Distance ratio at the exit of each text, for exits with prototypes",
            labels=["model"],
        )
        stages = HistogramMetricFamily(
            "de3_stage_latency_seconds",
            "Time of a text in each stage: queue, tokenize, model",
            labels=["model", "stage"],
        )
        ood = CounterMetricFamily(
            "de3_ood_texts",
            "Out-of-distribution texts, far from every prototype at an exit (--ood-policy)",
            labels=["model"],
        )
        flagged = CounterMetricFamily(
            "de3_flagged_texts", "Texts with a flagged answer (--flag, or a request's flag)", labels=["model"]
        )
        spans = CounterMetricFamily(
            "de3_spans",
            f"Spans in the answers of token classifiers, by label; {OTHER}: labels after the model's first "
            f"{MAX_SPAN_LABELS}, and those of another aggregation",
            labels=["model", "label"],
        )
        with self._lock:
            for name, texts in self._texts.items():
                texts.fold()
                for reason, histogram in texts.exits.items():
                    exits.add_metric([name, reason], *histogram.rows())
                run.add_metric([name], texts.run)
                saved.add_metric([name], texts.saved)
                full_depth.add_metric([name], texts.full_depth_s)
                tokens.add_metric([name], texts.tokens)
                entropy.add_metric([name], *texts.entropy.rows())
                ratio.add_metric([name], *texts.ratio.rows())
                for stage in STAGES:
                    stages.add_metric([name, stage], *getattr(texts, stage).rows())
                ood.add_metric([name], texts.far)
                flagged.add_metric([name], texts.flagged)
                for label, count in texts.spans.items():
                    spans.add_metric([name, label], count)
        yield from (
            exits,
            run,
            saved,
            full_depth,
            tokens,
            entropy,
            ratio,
            stages,
            ood,
            flagged,
            spans,
        )
