"""Anytime-valid tests and bounds for a rate, by betting: they hold at all times, however often they are checked.

Texts arrive one after another. Text t is audited with probability q_t, which is fixed before anything about the text is
known. A_t is 1 if it is audited; d_t is 1 if its early answer differs from full depth, which only an audit observes.
The mean of X_t = A_t·d_t/q_t is the rate ρ, whatever q_t is.

A gambler who bets that ρ is below r has the wealth W = Π (1 + λ_t·(r − X_t)), 1 at the start, where λ_t = c·q_t with a
constant c in (0, 1). If ρ is r or more, W is a nonnegative supermartingale, so the probability that it ever reaches 1/δ
is at most δ (Ville's inequality). The same holds for the mean of several such W with different c, which is an e-value
against "the rate is r or more". (Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting",
2024; Xu, Karampatziakis & Mineiro, "Active, anytime-valid risk controlling prediction sets", 2024.)

As λ_t is proportional to q_t, an audit that finds a difference costs about a fraction c of W, whatever q_t is.
Otherwise a few audits made when q was small would dominate.

W depends only on two counts for each q: all texts, and the audited texts that differ. So only these are stored.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

# LOWER: c, for bets that the rate is lower. HIGHER: κ, for bets that the rate is higher, with λ_t = κ·q_t; each κ is
# optimal if the rate is (1 + κ)·r.
LOWER = np.array([0.25, 0.5, 0.75])
HIGHER = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 32.0])
# Largest share of the wealth that a bet on a higher rate may lose when a text does not differ.
MOST_LOSS = 0.9
STEPS = 30  # bisection steps


def e_value(counts: Sequence[tuple[float, int, int]], rate: float) -> float:
    """`e_values` for one rate, several times faster. counts: (q, texts, audited texts that differ) for each q."""
    wealth = 0.0
    for c in LOWER.tolist():
        logs = sum(
            differing * math.log1p(c * (q * rate - 1.0)) + (texts - differing) * math.log1p(c * q * rate)
            for q, texts, differing in counts
        )
        wealth += math.exp(min(logs, 700.0))
    return wealth / len(LOWER)


def e_values(shares: Floats, texts: Counts, differing: Counts, rates: Floats) -> Floats:
    """E-values against "the rate is at least `rates`", (G,): evidence that the rate is lower.

    shares: q, (L,), each in (0, 1]. texts: number of texts at each q, audited or not, (L,) or (L, G). differing: number
    of audited texts that differ, (L, G). rates: r, (G,), each in (0, 1).
    """
    c, q, r = LOWER[:, None, None], shares[:, None], rates
    lost = np.log1p(c * (q * r - 1.0))
    kept = np.log1p(c * q * r)
    return _mean_exp((differing * lost + (texts.reshape(len(shares), -1) - differing) * kept).sum(1))


def e_values_above(shares: Floats, texts: Counts, differing: Counts, rates: Floats) -> Floats:
    """E-values against "the rate is at most `rates`", (G,): evidence that the rate is higher.

    The arguments are those of `e_values`, but texts is (L,).
    """
    q, r = shares[:, None], rates
    bets = np.minimum(HIGHER[:, None, None] * q, MOST_LOSS / r)  # λ
    won = np.log1p(bets * (1.0 / q - r))
    lost = np.log1p(-bets * r)
    return _mean_exp((differing * won + (texts[:, None] - differing) * lost).sum(1))


def bounds(shares: Floats, texts: Counts, differing: Counts, confidence: float) -> tuple[Floats, Floats]:
    """Lower and upper bounds on G rates, each (G,): a confidence sequence for each.

    With probability at least `confidence`, a rate is within its bounds at all times. Arguments: see `e_values_above`.
    """
    count = differing.shape[1]
    if not texts.any():
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

    lower = bisect(lambda rates: e_values_above(shares, texts, differing, rates) >= enough)
    upper = bisect(lambda rates: e_values(shares, texts, differing, rates) < enough)
    return np.where(differing.any(0), lower, 0.0), upper


def _mean_exp(logs: Floats) -> Floats:
    """Mean wealth over the bets, (G,), from the log wealth of each, (bets, G)."""
    return np.asarray(np.exp(np.minimum(logs, 700.0)).mean(0))


class ChangeDetector:
    """Fires when a rate has risen above r: a Shiryaev–Roberts e-detector (Shin, Ramdas & Rinaldo, 2023).

    At every text a new gambler enters with stake q_t and bets that the rate is above r; the statistic is the gamblers'
    total wealth, averaged over BETS. While the rate is at most r, the expected wealth is at most the sum of the stakes,
    so the mean number of audits before a false alarm is at least `patience`.
    """

    BETS = (0.5, 1.5, 4.0)  # κ, as in HIGHER

    def __init__(self, rate: float, patience: float) -> None:
        """rate: r, in (0, 1). patience: value of the statistic at which the detector fires."""
        self.rate, self.patience = rate, patience
        self.wealth = [0.0] * len(self.BETS)

    def count(self, share: float, differs: Sequence[bool], skipped: Sequence[int]) -> bool:
        """Count consecutive texts at q = `share`; returns True if the statistic has reached `patience`.

        differs: for each audited text, whether it differs. skipped: number of texts before each of them, and after the
        last one, that were not audited. If the detector fires, later texts are not counted.
        """
        bets = [min(bet * share, MOST_LOSS / self.rate) for bet in self.BETS]  # λ
        most = self.patience * len(bets)
        agrees = [1.0 - bet * self.rate for bet in bets]
        unlike = [1.0 + bet * (1.0 / share - self.rate) for bet in bets]
        for i, texts in enumerate(skipped):
            if texts:  # a geometric series: each text adds its stake, and every stake shrinks with each text
                powers = [factor**texts for factor in agrees]
                self.wealth = [
                    wealth * power + share * factor * (1.0 - power) / (1.0 - factor)
                    for wealth, factor, power in zip(self.wealth, agrees, powers, strict=True)
                ]
            if i < len(differs):
                factors = unlike if differs[i] else agrees
                self.wealth = [
                    (wealth + share) * factor for wealth, factor in zip(self.wealth, factors, strict=True)
                ]
                if sum(self.wealth) >= most:
                    return True
        return False
