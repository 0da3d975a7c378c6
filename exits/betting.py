"""Anytime-valid tests and bounds for a rate, by betting: they hold at all times, however often they are checked.

Texts are drawn for audits at random, whatever they say. d_t is 1 if the early answer to the t-th audited text differs
from full depth; its mean is the rate ρ, whatever the share of texts that are drawn is.

A gambler who bets that ρ is below r has the wealth W = Π (1 + c·(r − d_t)), 1 at the start, for a constant c in (0, 1).
If ρ is r or more, W is a nonnegative supermartingale, so the probability that it ever reaches 1/δ is at most δ (Ville's
inequality). The same holds for the mean of several such W with different c, which is an e-value against "the rate is r
or more". (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", 2024; Xu, Karampatziakis &
Mineiro, "Active, anytime-valid risk controlling prediction sets", 2024.)

W depends only on two counts: all audits, and those that differ. So only these are stored.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# LOWER: c, for bets that the rate is lower. HIGHER: κ, for bets that the rate is higher; each κ is optimal if the rate
# is (1 + κ)·r.
LOWER = np.array([0.25, 0.5, 0.75])
HIGHER = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0])
# Largest share of the wealth that a bet on a higher rate may lose when a text does not differ.
MOST_LOSS = 0.9
STEPS = 30  # bisection steps


def e_value(audits: int, differing: int, rate: float) -> float:
    """`e_values` for one rate, several times faster."""
    wealth = 0.0
    for c in LOWER.tolist():
        log = differing * math.log1p(c * (rate - 1.0)) + (audits - differing) * math.log1p(c * rate)
        wealth += math.exp(min(log, 700.0))
    return wealth / len(LOWER)


def e_values(audits: Counts, differing: Counts, rates: Floats) -> Floats:
    """E-values against "the rate is at least `rates`", (G,): evidence that the rate is lower.

    audits: number of audited texts. differing: number of those that differ. rates: r, each in (0, 1). All are (G,).
    """
    c = LOWER[:, None]
    return _mean_exp(differing * np.log1p(c * (rates - 1.0)) + (audits - differing) * np.log1p(c * rates))


def e_values_above(audits: Counts, differing: Counts, rates: Floats) -> Floats:
    """E-values against "the rate is at most `rates`", (G,): evidence that the rate is higher; see `e_values`."""
    bets = np.minimum(HIGHER[:, None], MOST_LOSS / rates)
    won, lost = np.log1p(bets * (1.0 - rates)), np.log1p(-bets * rates)
    return _mean_exp(differing * won + (audits - differing) * lost)


def bounds(audits: Counts, differing: Counts, confidence: float) -> tuple[Floats, Floats]:
    """Lower and upper bounds on G rates, each (G,): a confidence sequence for each.

    With probability at least `confidence`, a rate is within its bounds at all times. Arguments: see `e_values`.
    """
    count = len(differing)
    if not audits.any():
        return np.zeros(count), np.ones(count)
    enough = 2.0 / (1.0 - confidence)  # each side gets half of the error probability

    def bisect(holds: Callable[[Floats], NDArray[np.bool_]]) -> Floats:
        """The largest rates, (G,), that satisfy a condition; all lower rates satisfy it too."""
        low, high = np.zeros(count), np.ones(count)
        for _ in range(STEPS):
            middle = (low + high) / 2
            held = holds(middle)
            low, high = np.where(held, middle, low), np.where(held, high, middle)
        return high

    lower = bisect(lambda rates: e_values_above(audits, differing, rates) >= enough)
    upper = bisect(lambda rates: e_values(audits, differing, rates) < enough)
    return np.where(differing > 0, lower, 0.0), upper


def _mean_exp(logs: Floats) -> Floats:
    """Mean wealth over the bets, (G,), from the log wealth of each, (bets, G)."""
    return np.asarray(np.exp(np.minimum(logs, 700.0)).mean(0))


class ChangeDetector:
    """Fires when a rate has risen above r: a Shiryaev–Roberts e-detector (Shin, Ramdas & Rinaldo, 2023).

    At every audit a new gambler enters with stake 1 and bets that the rate is above r; the statistic is the gamblers'
    total wealth, averaged over BETS. While the rate is at most r, the expected wealth is at most the number of audits,
    so the mean number of audits before a false alarm is at least `patience`.
    """

    BETS = (0.5, 1.5, 4.0)  # κ, as in HIGHER

    def __init__(self, rate: float, patience: float) -> None:
        """rate: r, in (0, 1). patience: value of the statistic at which the detector fires."""
        self.rate, self.patience = rate, patience
        self.wealth = [0.0] * len(self.BETS)

    def count(self, differs: Sequence[bool]) -> bool:
        """Count audits; returns True if the statistic has reached `patience`, and then counts no later ones.

        differs: for each audited text, in order, whether it differs.
        """
        bets = [min(bet, MOST_LOSS / self.rate) for bet in self.BETS]
        agrees = [1.0 - bet * self.rate for bet in bets]
        unlike = [1.0 + bet * (1.0 - self.rate) for bet in bets]
        for is_unlike in differs:
            factors = unlike if is_unlike else agrees
            self.wealth = [
                (wealth + 1.0) * factor for wealth, factor in zip(self.wealth, factors, strict=True)
            ]
            if sum(self.wealth) >= self.patience * len(bets):
                return True
        return False
