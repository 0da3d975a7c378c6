"""The trade-off table and the default (λ, τ) of recorded exits, with confidence intervals.

λ and τ are chosen on one set of samples and evaluated on another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from exits import guarantee
from exits.recorded import Recorded
from exits.rule import exit_index
from exits.signals import Signal, signal_of

SIGNALS: tuple[Signal, ...] = tuple(signal_of(lam) for lam in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0))
# Quadratic spacing: most scores are near 0, so the grid is finest there.
TAUS = tuple(round((i / 60) ** 2, 6) for i in range(61))
# For the guarantees at the default λ; includes all of TAUS.
FINE_TAUS = tuple(round((i / 240) ** 2, 6) for i in range(241))
Z95 = 1.959964  # two-sided 95% quantile of the normal distribution
Z95_ONE_SIDED = 1.644854
MAX_SPEEDUP = 1000.0


@dataclass(frozen=True)
class Outcome:
    """Accuracy and cost of one (λ, τ) on a set of samples; model_store.manifest.TradeOff explains the fields.

    λ selects the signal, as in a manifest: 0 is entropy, otherwise EDR(λ).
    """

    lam: float
    tau: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]
    disagreement: float
    mean_exit_layer: float
    speedup: float
    histogram: list[float]
    disagreement_bound: float = 1.0  # set by trade_off, which needs the whole sequence


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a proportion: `successes` of n samples."""
    p, z = successes / n, Z95
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def speedup(num_layers: int, mean_exit_layer: float) -> float:
    """M / mean exit layer, capped at 1000: a sample that exits at layer 0 runs no layer."""
    return min(MAX_SPEEDUP, num_layers / mean_exit_layer) if mean_exit_layer > 0 else MAX_SPEEDUP


def outcome(recorded: Recorded, scores: NDArray[np.float64], tau: float, lam: float) -> Outcome:
    """The outcome of exiting at score < τ; `scores` holds every exit of every sample, (n, exits)."""
    index = exit_index(scores, tau)
    rows = np.arange(len(index))
    correct = recorded.correct
    early, full = correct[rows, index], correct[:, -1]
    n = len(index)
    loss, error = _mean_and_error(full.astype(float) - early) if tau > 0 else (0.0, 0.0)
    labels = recorded.logits.argmax(-1)
    mean_layer = float(np.asarray(recorded.exit_layers)[index].mean())
    return Outcome(
        lam=lam,
        tau=tau,
        accuracy=float(early.mean()),
        accuracy_interval=wilson(int(early.sum()), n),
        loss=loss,
        loss_interval=(loss - Z95 * error, loss + Z95 * error),
        disagreement=float((labels[rows, index] != labels[:, -1]).mean()),
        mean_exit_layer=mean_layer,
        speedup=speedup(recorded.exit_layers[-1], mean_layer),
        histogram=(np.bincount(index, minlength=len(recorded.exit_layers)) / n).tolist(),
    )


def _mean_and_error(losses: NDArray[np.float64]) -> tuple[float, float]:
    """The mean and its standard error; the variance is at least that of one differing sample in n."""
    n = len(losses)
    return float(losses.mean()), math.sqrt(max(float(losses.var()), 1 / n) / n)


def paired_interval(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float]:
    """95% interval of the accuracy that `after` lost against `before`, each (n,), on the same samples."""
    loss, error = _mean_and_error(before.astype(float) - after)
    return loss - Z95 * error, loss + Z95 * error


def trade_off(
    recorded: Recorded, candidates: Sequence[Signal] = SIGNALS, taus: Sequence[float] = TAUS
) -> list[Outcome]:
    """The outcome of every signal and τ; a signal's disagreement bounds form one fixed sequence of ascending τ."""
    table, n = [], len(recorded.labels)
    for signal in candidates:
        scores = signal.scores(recorded)
        rows = [outcome(recorded, scores, tau, signal.lam) for tau in sorted(taus)]
        # At τ = 0 every answer is that of full depth: there is nothing to bound.
        errors = [round(row.disagreement * n) for row in rows if row.tau > 0]
        bounds = [0.0] * (len(rows) - len(errors)) + guarantee.sequence_bounds(errors, n)
        table += [replace(row, disagreement_bound=b) for row, b in zip(rows, bounds, strict=True)]
    return table


def choose(table: Sequence[Outcome], max_loss: float) -> Outcome:
    """The fastest outcome whose loss against full depth is below max_loss, with a margin for sampling error.

    The one-sided 95% upper bound of the loss must be below max_loss. τ = 0 is always allowed.
    """

    def upper(o: Outcome) -> float:
        error = (o.loss_interval[1] - o.loss) / Z95
        return o.loss + Z95_ONE_SIDED * error

    allowed = [o for o in table if o.tau == 0 or upper(o) < max_loss]
    return min(allowed, key=lambda o: (o.mean_exit_layer, o.loss, o.lam, o.tau))
