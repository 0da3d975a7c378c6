"""Statistical bound on the rate of early answers that differ from full depth.

Risk control by Learn-then-Test with fixed-sequence testing ("Fast yet Safe: Early-Exiting with Risk
Control", NeurIPS 2024): τ ascends from 0, an exact binomial bound limits the rate of differing answers at
each step, and the first step whose bound is too high ends the sequence. The order is fixed before the data
are seen, so every step may use the full error probability. The true rate exceeds the requested one in at
most 5% of calibrations.
"""

import numpy as np

CONFIDENCE = 0.95
# Of a bound on samples that were also fitted to, cross-fitted. It is not exact, so it is stricter than what is
# promised, which simulations then kept (lab/docs/import.md).
CROSSED = 0.98


def upper_bound(errors: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper–Pearson upper bound on an error rate, in [0, 1], for `errors` in n samples.

    The p for which P(Binomial(n, p) ≤ errors) = 1 − confidence. Raises ValueError unless 0 ≤ errors ≤ n and n ≥ 1.
    """
    if not 0 <= errors <= n or n < 1:
        raise ValueError(f"errors must be from 0 to n and n at least 1, got {errors} of {n}")
    if errors == n:
        return 1.0
    k = np.arange(errors + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_binomials = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    low, high = errors / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        if p == 1.0:  # low and high are adjacent floats
            break
        if np.exp(log_binomials + k * np.log(p) + (n - k) * np.log1p(-p)).sum() > 1 - confidence:
            low = p
        else:
            high = p
    return float(high)
