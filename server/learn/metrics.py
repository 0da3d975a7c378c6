"""Prometheus metrics of learning from live traffic."""

from collections.abc import Iterable
from functools import partial
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from de3.server.learn.journal import FitOutcome
from de3.server.learn.learners import Learners


class LearnMetrics(Collector):
    """Metrics of records and fits, by model name."""

    def __init__(self, learners: Learners) -> None:
        self._learners = learners

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """The metrics, those of fits only with --learn; a speed-up is 1 until a fit has measured one."""
        gauge = partial(GaugeMetricFamily, labels=["model"])
        records = gauge("de3_learn_records", "Records of live traffic in memory, to which exits are fitted")
        next_fit = gauge("de3_learn_missing_records", "Records still needed before the next fit of exits")
        fitting = gauge("de3_learn_fitting", "1 while a fit of exits runs, else 0")
        speedup = gauge(
            "de3_learn_speedup",
            "Speed-up in layers that the exits of the latest fit allow at the guaranteed rate, on held-out records",
        )
        proved = gauge(
            "de3_learn_proved_speedup", "Speed-up in layers that the held-out records of the latest fit prove"
        )
        fits = CounterMetricFamily(
            "de3_learn_fits",
            "Fits of exits since the server started, by outcome: served, waits, pinned, not_faster, outdated or failed",
            labels=["model", "outcome"],
        )
        for learner in self._learners.all:
            name, results = [learner.name], learner.journal.results
            records.add_metric(name, len(learner.reservoir))
            if not self._learners.starts_fits:
                continue
            next_fit.add_metric(name, max(0, learner.due_at - learner.count))
            fitting.add_metric(name, learner.phase != "recording")
            measured = [one for one in results if one.speedup is not None]
            speedup.add_metric(name, (measured[-1].speedup if measured else None) or 1.0)
            proved.add_metric(name, (measured[-1].proved_speedup if measured else None) or 1.0)
            for outcome in get_args(FitOutcome):
                fits.add_metric([learner.name, outcome], self._learners.fits.get((learner.name, outcome), 0))
        yield from (records, next_fit, fitting, speedup, proved, fits)
