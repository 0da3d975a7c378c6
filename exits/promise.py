"""What audits of live traffic tell of each τ, and the τ that a promise allows.

An audit runs a text to full depth and sees, without a label, what every τ would have answered (`profile`). `Evidence`
counts these by τ. `Promise` raises τ while the evidence says that the rate of answers that differ from full depth stays
within the promise, and takes it back when that rate has risen.

The fixed order of the τ, ascending from 0, makes this one test, not many: τ rises to the next one only once the e-value
of "its rate is above the promise" has reached 1/δ, and stops at the first that has not. The first τ whose rate is above
the promise is ever passed with probability δ at most; so is the promise ever broken, between two changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exits import betting
from exits.guarantee import CONFIDENCE

# Audits to a false alarm, in the mean, of a rate that is just what was promised. A lower one takes far longer.
PATIENCE = 1e5
MAX_SHARES = 64  # kept apart; a server has about ten

Reason = Literal["start", "calibrated", "evidence", "change", "reset"]


class Profile(NamedTuple):
    """What each τ of a grid would have done with one text, (G,): whether the answer differs from full depth's, and its
    exit layer."""

    differs: NDArray[np.bool_]
    layers: NDArray[np.int64]


def profile(
    scores: Sequence[float | None],
    differs: Sequence[bool],
    layers: Sequence[int],
    taus: NDArray[np.float64],
) -> Profile:
    """The profile of a text that passed every exit, by the rule of `exits.rule`: the first score below τ, else the
    last.

    scores: of each exit; None or NaN: it has none. differs: whether its answer is not the last one's. layers: of the
    exits.
    """
    below = np.array([np.inf if score is None else score for score in scores[:-1]])
    least = np.minimum.accumulate(np.where(np.isnan(below), np.inf, below))
    index = (least[:, None] >= taus).sum(0)
    return Profile(np.array(differs)[index], np.array(layers)[index])


@dataclass(slots=True)
class Tally:
    """What came while texts were drawn with one probability.

    Attributes:
        texts: all, drawn or not.
        audits: the drawn ones.
        served: those of them whose answer, as it was sent, differs from full depth.
        differing: those that would differ at each τ, (G,).
        layers: the sum of their exit layers at each τ, (G,).
    """

    texts: int
    audits: int
    served: int
    differing: NDArray[np.int64]
    layers: NDArray[np.int64]


@dataclass
class Evidence:
    """The audits of one model and signal so far.

    Attributes:
        taus: the grid, (G,), ascending from 0.
        tallies: by the probability q with which texts were drawn.
    """

    taus: NDArray[np.float64]
    tallies: dict[float, Tally] = field(default_factory=dict)

    def skip(self, share: float, texts: int) -> None:
        """Count texts that were not drawn."""
        if texts:
            self._tally(share).texts += texts

    def add(self, share: float, audit: Profile, served_differs: bool = False) -> None:
        """Count an audit."""
        tally = self._tally(share)
        tally.texts += 1
        tally.audits += 1
        tally.served += served_differs
        tally.differing += audit.differs
        tally.layers += audit.layers

    def _tally(self, share: float) -> Tally:
        if not 0 < share <= 1:
            raise ValueError(f"a share must be above 0 and at most 1, got {share}")
        if share not in self.tallies:
            if len(self.tallies) == MAX_SHARES:
                raise ValueError(f"at most {MAX_SHARES} shares are kept apart")
            zeros = np.zeros(len(self.taus), np.int64)
            self.tallies[share] = Tally(0, 0, 0, zeros, zeros.copy())
        return self.tallies[share]

    @property
    def texts(self) -> int:
        """Texts, drawn or not."""
        return sum(tally.texts for tally in self.tallies.values())

    @property
    def audits(self) -> int:
        """Texts that were drawn."""
        return sum(tally.audits for tally in self.tallies.values())

    def served(self) -> float | None:
        """The rate of answers that differed from full depth as they were sent; None without audits."""
        weight = self._weight()
        return sum(t.served / share for share, t in self.tallies.items()) / weight if weight else None

    def rates(self) -> betting.Floats:
        """The rate at each τ, (G,), each audit weighted by 1/q; NaN without audits."""
        return self._mean([tally.differing for tally in self.tallies.values()])

    def mean_layers(self) -> betting.Floats:
        """The mean exit layer at each τ, (G,); NaN without audits."""
        return self._mean([tally.layers for tally in self.tallies.values()])

    def _weight(self) -> float:
        return sum(tally.audits / share for share, tally in self.tallies.items())

    def _mean(self, sums: Sequence[NDArray[np.int64]]) -> betting.Floats:
        weight = self._weight()
        if not weight:
            return np.full(len(self.taus), np.nan)
        return np.asarray(sum(s / share for share, s in zip(self.tallies, sums, strict=True)) / weight)

    def bounds(self, index: slice = slice(None)) -> tuple[betting.Floats, betting.Floats]:
        """Bounds of the rates at some τ, which hold at every moment with 95% confidence for each τ."""
        if not self.tallies:
            count = len(self.taus[index])
            return np.zeros(count), np.ones(count)
        shares, texts, differing = self._counts(index)
        return betting.bounds(shares, texts, differing, CONFIDENCE)

    def e_values(self, rate: float, index: slice = slice(None)) -> betting.Floats:
        """The e-values of "the rate at this τ is above `rate`", of some τ."""
        count = len(self.taus[index])
        if not self.tallies:
            return np.ones(count)
        return betting.e_values(*self._counts(index), np.full(count, rate))

    def _counts(self, index: slice) -> tuple[betting.Floats, betting.Counts, betting.Counts]:
        tallies = list(self.tallies.values())
        texts = np.array([tally.texts for tally in tallies])
        return np.array(list(self.tallies)), texts, np.stack([tally.differing[index] for tally in tallies])


class Promise:
    """Keeps the rate of answers that differ from full depth within `rate`: which τ is in force, and why.

    Attributes:
        evidence: since the start, or the last change or reset.
        index: of τ in the grid.
        reason: start (τ = 0, as nothing is known), calibrated (the offline certificate's), evidence (raised by audits),
            change (the rate had risen, and what was known is void) or reset (by an admin).
    """

    def __init__(self, rate: float, taus: NDArray[np.float64], start: int = 0) -> None:
        """start: the index of the τ to begin with, which is not tested."""
        if not 0 < rate < 1:
            raise ValueError(f"a promise must be above 0 and below 1, got {rate}")
        self.rate = rate
        self.evidence = Evidence(taus)
        self.index = start
        self.reason: Reason = "calibrated" if start else "start"
        self._detector = betting.ChangeDetector(rate, PATIENCE)

    @property
    def tau(self) -> float:
        """τ in force; 0: every answer is full depth's."""
        return float(self.evidence.taus[self.index])

    def skip(self, share: float, texts: int) -> None:
        """Count texts that were not drawn."""
        self.evidence.skip(share, texts)
        if self.index:
            self._detector.skip(share, texts)

    def add(self, share: float, audit: Profile, served_differs: bool = False) -> bool:
        """Count an audit; whether τ changed."""
        before = self.index
        self.evidence.add(share, audit, served_differs)
        if self.index:
            self._detector.add(share, bool(audit.differs[self.index]))
            if self._detector.has_fired:
                self.reset("change")
                return True
        self._raise()
        return self.index != before

    def _raise(self) -> None:
        while self.index + 1 < len(self.evidence.taus) and self._may_pass(self.index + 1):
            self.index += 1
            self.reason = "evidence"

    def _may_pass(self, index: int) -> bool:
        e_value = self.evidence.e_values(self.rate, slice(index, index + 1))[0]
        return bool(e_value >= 1 / (1 - CONFIDENCE))

    def reset(self, reason: Reason) -> None:
        """Forget what is known, and answer at full depth again."""
        self.evidence = Evidence(self.evidence.taus)
        self.index, self.reason = 0, reason
        self._detector = betting.ChangeDetector(self.rate, PATIENCE)

    def adopt(self, evidence: Evidence) -> None:
        """Begin with evidence that was gathered without this promise: τ rises as far as it allows."""
        self.evidence = evidence
        self._raise()

    @property
    def detector(self) -> betting.Floats:
        """What the change detector owns, for `restore`."""
        return self._detector.wealth

    def restore(self, evidence: Evidence, tau: float, reason: Reason, detector: Sequence[float]) -> None:
        """Go on where another left off; raises ValueError for a τ that is not of the grid, or an impossible wealth."""
        match = np.flatnonzero(evidence.taus == tau)
        wealth = np.array(detector, np.float64)
        if len(match) != 1 or wealth.shape != self._detector.wealth.shape or not (wealth >= 0).all():
            raise ValueError("tau or detector does not fit the grid")
        self.evidence, self.index, self.reason = evidence, int(match[0]), reason
        self._detector.wealth = wealth
