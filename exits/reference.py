"""Reference distributions of the signals, as quantiles of the calibration samples.

They are the baseline for a text's out-of-distribution (OOD) score, and for the drift of traffic.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# The levels are finer at the ends, because the OOD score depends on the upper tail.
LEVELS = (
    *(0.0, 0.01, 0.02),
    *(round(0.05 * i, 2) for i in range(1, 20)),
    *(0.98, 0.99, 0.995, 0.998, 0.999, 1.0),
)
FAR_LEVEL = 0.99  # a distance above this quantile is out of distribution
MIN_TAIL = 0.0005  # tail of a value above every calibration sample
BINS = 10  # bins of the PSI
DIGITS = 6


def quantiles(values: NDArray[np.floating] | NDArray[np.integer]) -> list[float]:
    """The quantiles at LEVELS of samples (n,), rounded to DIGITS."""
    return [round(float(x), DIGITS) for x in np.quantile(np.asarray(values, np.float64), LEVELS)]


def far(reference: Sequence[float]) -> float:
    """The distance to the nearest prototype above which a text is out of distribution: the quantile at FAR_LEVEL."""
    return reference[LEVELS.index(FAR_LEVEL)]


def tail(value: float, reference: Sequence[float]) -> float:
    """The share of calibration samples ≥ value, in [MIN_TAIL, 1]; interpolated linearly between quantiles."""
    return max(MIN_TAIL, 1.0 - _level(value, reference))


def _level(value: float, reference: Sequence[float]) -> float:
    """The share of calibration samples < value: the reference's cumulative distribution function."""
    i = bisect_left(reference, value)
    if i == 0:
        return 0.0
    if i == len(reference):
        return 1.0
    low, high = reference[i - 1], reference[i]
    share = (value - low) / (high - low)
    return LEVELS[i - 1] + share * (LEVELS[i] - LEVELS[i - 1])


def ood_score(nearest: Sequence[float], references: Sequence[Sequence[float]]) -> float | None:
    """The OOD score of a text, in [0, 1): 1 − the geometric mean of `tail` over the exits it passed.

    nearest: distance to the nearest prototype at each passed exit that has prototypes. references: quantiles of these
    distances. Returns None if there is no such exit. Of the scores tested, this one separates texts of another domain
    best (lab/docs/experiments/drift.md).
    """
    if not nearest:
        return None
    logs = [math.log(tail(x, q)) for x, q in zip(nearest, references, strict=True)]
    return 1.0 - math.exp(sum(logs) / len(logs))


def psi(values: Sequence[float], reference: Sequence[float]) -> float:
    """Population stability index of a window of values against the calibration deciles; 0: no difference.

    By convention, a PSI above 0.25 means that the inputs have shifted. Each bin's count starts at ½, so none is empty.
    """
    upto: dict[float, float] = {}  # share of samples up to each decile; for equal deciles, up to the last
    for i in range(1, BINS):
        level = round(i / BINS, 2)
        upto[reference[LEVELS.index(level)]] = level
    edges, shares = list(upto), [b - a for a, b in pairwise([0.0, *upto.values(), 1.0])]
    counts = [0.5] * len(shares)
    for x in values:
        counts[bisect_left(edges, round(x, DIGITS))] += 1
    total = sum(counts)
    return sum((c / total - s) * math.log(c / total / s) for c, s in zip(counts, shares, strict=True))


def ks(values: Sequence[float], reference: Sequence[float]) -> float:
    """Kolmogorov–Smirnov statistic of values and reference: the largest gap between their distribution functions."""
    ordered, largest = sorted(round(x, DIGITS) for x in values), 0.0
    for x in set(ordered):
        below, upto = bisect_left(ordered, x) / len(ordered), bisect_right(ordered, x) / len(ordered)
        equal = bisect_right(reference, x)  # equal quantiles: the reference jumps
        reached = LEVELS[equal - 1] if equal and reference[equal - 1] == x else _level(x, reference)
        largest = max(largest, abs(_level(x, reference) - below), abs(upto - reached))
    return largest


def is_ascending(values: Sequence[float]) -> bool:
    """True if there is a value for each of LEVELS, and none is below the one before."""
    return len(values) == len(LEVELS) and all(a <= b for a, b in pairwise(values))
