"""How often early answers may differ from full depth, with a promise that holds.

Risk control by Learn-then-Test with a fixed sequence ("Fast yet Safe: Early-Exiting with Risk Control",
NeurIPS 2024): τ is raised from 0 on, the rate of differing answers is bounded at each step by an exact
binomial bound, and the first step whose bound is too high ends the walk. Because the order is fixed before
the data are seen, every step may use the full error probability: in at most 5% of calibrations is the true
rate above the one asked for.
"""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def upper_bound(errors: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided Clopper–Pearson bound of a rate of which `errors` of n samples were seen, in [0, 1].

    The p with P(Binomial(n, p) ≤ errors) = 1 − confidence.
    """
    if not 0 <= errors <= n or n < 1:
        raise ValueError(f"errors must be from 0 to n and n at least 1, got {errors} of {n}")
    if errors == n:
        return 1.0
    k = np.arange(errors + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    ways = factorials[n] - factorials[k] - factorials[n - k]
    low, high = errors / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        if p == 1.0:  # no room left between the two
            break
        if np.exp(ways + k * np.log(p) + (n - k) * np.log1p(-p)).sum() > 1 - confidence:
            low = p
        else:
            high = p
    return float(high)


def sequence_bounds(errors: Sequence[int], n: int, confidence: float = CONFIDENCE) -> list[float]:
    """Bounds for settings in the fixed order in which they are tried; each at least as high as those before.

    The last setting whose bound is below a wish is the one to take, and the bound holds for it.
    """
    found: list[float] = []
    known: dict[int, float] = {}
    for count in errors:
        if count not in known:
            known[count] = upper_bound(count, n, confidence)
        found.append(max(known[count], found[-1] if found else 0.0))
    return found
