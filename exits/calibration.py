"""Trade-offs of accuracy and speed-up by τ, with confidence intervals, and the choice of the default τ.

See `export.calibrate` for the choice of the signal, and for the samples that each step uses.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from de3.exits import bound
from de3.exits.flags import Flag
from de3.exits.guarantee import profiles
from de3.exits.kinds import Classes, Labels, Spans, Value
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Edr, Entropy, Signal

LAMS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Quadratic spacing: most scores are near 0, so the grid is finest there.
TAUS = tuple(round((i / 60) ** 2, 6) for i in range(61))
# Grid for the guarantees; includes all of TAUS.
FINE_TAUS = tuple(round((i / 240) ** 2, 6) for i in range(241))
Z95 = 1.959964  # two-sided 95% quantile of the normal distribution
Z95_ONE_SIDED = 1.644854
MAX_SPEEDUP = 1000.0
DISAGREEMENTS = (0.01, 0.02, 0.05)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TradeOff:
    """Accuracy and cost of one signal and τ on a set of samples; model_store.manifest.TradeOff documents the fields."""

    signal: str
    lam: float | None
    tau: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    disagreement: float
    mean_exit_layer: float
    speedup: float
    histogram: list[float]
    disagreement_bound: float = 1.0  # set by trade_off, as it depends on the whole sequence


@dataclass(frozen=True)
class Samples:
    """Recorded samples; related ones share a group.

    Attributes:
        recorded: the outputs of every exit for n samples.
        groups: group number of each sample, (n,).
    """

    recorded: Recorded
    groups: NDArray[np.int64]

    @classmethod
    def independent(cls, recorded: Recorded) -> "Samples":
        """Samples that are unrelated: each is its own group."""
        return cls(recorded, np.arange(len(recorded.labels)))

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return len(np.unique(self.groups))

    def rows(self, which: NDArray[np.bool_]) -> "Samples":
        """The samples for which the mask `which`, (n,), is true."""
        return Samples(self.recorded.rows(which), self.groups[which])


def candidates(recorded: Recorded) -> list[Signal]:
    """The signals that need no fitting: entropy, and EDR with several λ values if classes are mutually exclusive.

    A regression model and a token classifier have none.
    """
    match recorded.kind:
        case Classes():
            return [Entropy(), *(Edr(lam) for lam in LAMS)]
        case Labels():
            return [Entropy()]
        case Value() | Spans():
            return []


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95% Wilson score interval of a proportion: `successes` of n samples."""
    p, z = successes / n, Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def speedup(num_layers: int, mean_exit_layer: float) -> float:
    """num_layers / mean exit layer, capped at 1000: a sample that exits at layer 0 runs no layer."""
    return min(MAX_SPEEDUP, num_layers / mean_exit_layer) if mean_exit_layer > 0 else MAX_SPEEDUP


def times(speedup: float) -> str:
    """A speed-up in layers for people; beyond 100, hardly any text runs a layer, and the number says nothing more."""
    return f"{speedup:.2f}×" if speedup < 100 else "over 100×"


def outcome(samples: Samples, scores: Floats, tau: float, signal: Signal) -> TradeOff:
    """The outcome of exiting at score < τ; scores are (n, exits)."""
    recorded = samples.recorded
    index = exit_index(scores, tau)
    rows = np.arange(len(index))
    correct = recorded.correct
    early, full = correct[rows, index], correct[:, -1]
    n = len(index)
    loss, error = _loss(samples, full.astype(float) - early, index) if tau > 0 else (0.0, 0.0)
    mean_cost = float(np.asarray(recorded.exit_costs)[index].mean())
    size = effective_size(early, samples.groups)
    return TradeOff(
        signal=signal.name,
        lam=signal.lam,
        tau=tau,
        accuracy=float(early.mean()),
        accuracy_interval=wilson(early.mean() * size, size),
        loss=loss,
        loss_interval=(loss - Z95 * error, loss + Z95 * error),
        disagreement=max(float(differs.mean()) for differs, _ in _unlike(samples, index)),
        mean_exit_layer=mean_cost,
        speedup=speedup(recorded.exit_costs[-1], mean_cost),
        histogram=(np.bincount(index, minlength=len(recorded.exit_layers)) / n).tolist(),
    )


def _unlike(samples: Samples, index: NDArray[np.int64]) -> list[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Each kind of disagreement at the exits `index`, (n,): of m samples, with their groups; none of no samples."""
    return [
        (differs[np.arange(len(rows)), index[rows]], samples.groups[rows])
        for differs, rows in samples.recorded.failures()
        if len(rows)
    ]


def _loss(samples: Samples, lost: Floats, index: NDArray[np.int64]) -> tuple[float, float]:
    """Loss of accuracy and its error. lost: of each sample, (n,).

    With several kinds of disagreement (of spans), those of the kind with the highest upper bound.
    """
    losses = [mean_and_error(lost, samples.groups)]
    full = np.full(len(index), len(samples.recorded.exit_layers) - 1)
    for (early, groups), (late, _) in zip(
        _unlike(samples, index)[1:], _unlike(samples, full)[1:], strict=True
    ):
        losses.append(mean_and_error(early.astype(float) - late, groups))
    return max(losses, key=lambda one: one[0] + Z95_ONE_SIDED * one[1])


def mean_and_error(values: Floats, groups: NDArray[np.int64]) -> tuple[float, float]:
    """The mean of values (n,) and its standard error, clustered by group.

    The error is at least 1 / number of groups: about the error if a single group differs.
    """
    return float(values.mean()), max(_standard_error(values, groups), 1 / len(np.unique(groups)))


def _standard_error(values: Floats, groups: NDArray[np.int64]) -> float:
    n = len(values)
    error = math.sqrt(float(values.var()) / n)
    _, number = np.unique(groups, return_inverse=True)
    if (count := int(number.max()) + 1) < n:
        totals = np.bincount(number, values - values.mean(), count)
        error = max(error, math.sqrt(float((totals**2).sum()) * count / max(1, count - 1)) / n)
    return error


def effective_size(hits: NDArray[np.bool_], groups: NDArray[np.int64]) -> float:
    """Effective sample size: number of independent samples that estimate a proportion as precisely as these."""
    n, count, mean = len(hits), len(np.unique(groups)), float(hits.mean())
    if count in (1, n) or not 0 < mean < 1:  # the correlation within groups cannot be estimated
        return float(count)
    return max(1.0, min(n, mean * (1 - mean) / _standard_error(hits.astype(float), groups) ** 2))


def paired_interval(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    """95% interval of the accuracy lost from `before` to `after`, on the same samples.

    before, after: True where the answer is correct, (n,).
    """
    loss, error = mean_and_error(before.astype(float) - after, np.arange(len(before)))
    return loss - Z95 * error, loss + Z95 * error


def trade_off(
    samples: Samples,
    signal: Signal,
    taus: Sequence[float] = TAUS,
    scores: Floats | None = None,
    confidence: float = bound.CONFIDENCE,
) -> list[TradeOff]:
    """The outcomes of one signal by ascending τ; their disagreement bounds never decrease (see `exits.bound`).

    scores: cross-fitted scores, (n, exits); None for the signal's own. confidence: of the bounds.
    """
    if scores is None:
        scores = signal.scores(samples.recorded)
    rows = [outcome(samples, scores, tau, signal) for tau in sorted(taus)]
    # At τ = 0 every answer is full depth's: there is nothing to bound, unless full depth differs from the original.
    above = [row for row in rows if row.tau > 0 or samples.recorded.original is not None]
    bounds, cache = [0.0] * (len(rows) - len(above)), dict[tuple[float, int], float]()
    for row in above:
        highest = 0.0
        for differs, groups in _unlike(samples, exit_index(scores, row.tau)):
            n, rate = round(effective_size(differs, groups)), float(differs.mean())
            key = (rate, n)
            if key not in cache:
                cache[key] = bound.upper_bound(math.ceil(rate * n - 1e-9), n, confidence)
            highest = max(highest, cache[key])
        bounds.append(max(bounds[-1], highest) if bounds else highest)
    return [replace(row, disagreement_bound=b) for row, b in zip(rows, bounds, strict=True)]


def missed_bounds(
    samples: Samples,
    flag: Flag,
    scores: Floats,
    taus: Sequence[float],
    confidence: float = bound.CONFIDENCE,
) -> tuple[int, list[float]]:
    """The number of independent samples that full depth flags, and by τ the bound on the share of them that is missed.

    scores: (n, exits). taus: ascending from 0. confidence: of the bounds, which never decrease; without a flagged
    sample, they are 1 above 0.
    """
    recorded = samples.recorded
    fails, rows = recorded.failures(flag)[-1]
    blocked, groups = recorded.blocked(flag)[rows], samples.groups[rows]
    missed = profiles(scores[rows], fails, recorded.exit_costs, np.array(taus), blocked).differs
    count, bounds = len(np.unique(groups)), [0.0]
    for column in missed.T[1:]:
        n = round(effective_size(column, groups)) if count else 0
        found = bound.upper_bound(math.ceil(float(column.mean()) * n - 1e-9), n, confidence) if n else 1.0
        bounds.append(max(bounds[-1], found))
    return count, bounds


def upper_loss(row: TradeOff) -> float:
    """The one-sided 95% upper bound on a row's loss.

    Exits that were more accurate than full depth on these samples count as equally accurate: the
    difference is luck, which cannot be expected on other texts.
    """
    return max(0.0, row.loss) + Z95_ONE_SIDED * (row.loss_interval[1] - row.loss) / Z95


def within_loss(table: Iterable[TradeOff], max_loss: float) -> TradeOff:
    """The last row, by ascending τ, up to which every row's loss is below max_loss with 95% confidence.

    The rows of one signal are tested in this order, which was fixed before the data were seen. The first that fails
    ends the sequence, so the confidence holds for the chosen row. τ = 0 always passes.
    """
    ascending = sorted(table, key=lambda row: row.tau)
    passes = takewhile(lambda row: not (row.tau > 0 and upper_loss(row) >= max_loss), ascending)
    return list(passes)[-1]


def speed_within(table: Iterable[TradeOff], disagreement: float) -> float:
    """The highest speed-up of the rows whose disagreement is at most `disagreement`; the row τ = 0 always counts."""
    return max(row.speedup for row in table if row.tau == 0 or row.disagreement <= disagreement)


def mean_speedup(table: Sequence[TradeOff]) -> float:
    """The geometric mean of a signal's speed-ups at 1, 2 and 5% disagreement.

    Disagreement is with full depth or, for an import, with the original.
    """
    return math.exp(sum(math.log(speed_within(table, d)) for d in DISAGREEMENTS) / len(DISAGREEMENTS))
