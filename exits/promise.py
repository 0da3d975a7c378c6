"""What audits of live traffic tell of each τ, and the τ that a promise allows.

An audit runs a text to full depth and sees, without a label, what every τ would have answered (`profile`). `Evidence`
counts these by τ. `Promise` raises τ while the evidence says that the rate of answers that differ from full depth stays
within the promise, and takes it back when that rate has risen.

The fixed order of the τ, ascending from 0, makes this one test, not many: τ rises to the next one only once the e-value
of "its rate is above the promise" has reached 1/δ, and stops at the first that has not. The first τ whose rate is above
the promise is ever passed with probability δ at most, from the start, or from a reset, until the traffic changes.

Traffic changes, and by little it cannot be told from chance for a long time. So τ is also lowered as far as the recent
audits want it (`Recent`), which takes no proof; and what was proved becomes void when the change detector fires.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.exits import betting
from de3.exits.guarantee import CONFIDENCE

# Audits to a false alarm, in the mean, of a rate that is just what was promised. A lower one takes far longer.
PATIENCE = 1e5
MAX_SHARES = 64  # kept apart; a server has about ten
# Audits that are recent: more where fewer than LEAST_EXPECTED of them may differ.
RECENT, LEAST_EXPECTED = 300, 6

Reason = Literal["start", "calibrated", "evidence", "recent", "change", "reset"]


class Kept(NamedTuple):
    """A promise as another server left it.

    Attributes:
        tau: the last that was proved.
        start: the τ below which nothing was proved.
        reason: why, as in Promise.
        detector: what the gamblers of the change detector own.
        weight, recent: see Recent.
    """

    rate: float
    tau: float
    start: float
    reason: Reason
    detector: list[float]
    weight: float
    recent: list[float]


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

    def copy(self) -> "Evidence":
        """As it is now; another thread may go on counting."""
        tallies = {
            share: replace(tally, differing=tally.differing.copy(), layers=tally.layers.copy())
            for share, tally in list(self.tallies.items())
        }
        return Evidence(self.taus, tallies)

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
        """Bounds of the rates at some τ, which hold at every moment with 95% confidence for each τ.

        Bets do not weight audits as rates() does, so a rate may be outside; the bounds are then widened to it.
        """
        if not self.audits:
            count = len(self.taus[index])
            return np.zeros(count), np.ones(count)
        shares, texts, differing = self._counts(index)
        lower, upper = betting.bounds(shares, texts, differing, CONFIDENCE)
        rates = self.rates()[index]
        return np.minimum(lower, rates), np.maximum(upper, rates)

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


class Recent:
    """The rates of the last audits, by τ; older ones fade.

    Attributes:
        weight: of the audits so far, at most `window`.
        differing: the weight of those that would differ at each τ, (G,).
    """

    def __init__(self, rate: float, count: int) -> None:
        """rate: what is promised. count: G."""
        self._rate, self._window = rate, max(RECENT, LEAST_EXPECTED / rate)
        self._error = math.sqrt(rate * (1 - rate) / self._window)
        self.weight, self.differing = 0.0, np.zeros(count)

    def add(self, differs: NDArray[np.bool_]) -> None:
        """Count an audit."""
        stays = 1 - 1 / self._window
        self.weight = self.weight * stays + 1
        self.differing = self.differing * stays + differs

    def allows(self, index: int) -> int:
        """The last τ, up to this index, before the first whose recent rate is not below the promise by a standard
        error; this index while there are few audits."""
        if self.weight < self._window / 3:
            return index
        above = self.differing[: index + 1] > (self._rate - self._error) * self.weight
        return max(0, int(above.argmax()) - 1) if above.any() else index


class Promise:
    """Keeps the rate of answers that differ from full depth within `rate`: which τ is in force, and why.

    Attributes:
        evidence: since the start, or the last change or reset.
        proved: the index of the last τ that was proved, or that was the start.
        index: of τ in force, at most `proved`.
        reason: start (τ = 0, as nothing is known), calibrated (the offline certificate's), evidence (raised by audits),
            recent (below what was proved, as recent audits want it), change (the rate had risen, and what was known is
            void) or reset (by an admin).
    """

    def __init__(self, rate: float, taus: NDArray[np.float64], start: int = 0) -> None:
        """start: the index of the τ to begin with, which is not tested."""
        if not 0 < rate < 1:
            raise ValueError(f"a promise must be above 0 and below 1, got {rate}")
        self.rate = rate
        self.evidence = Evidence(taus)
        self.proved = self.index = self._start = start
        self._why: Reason = "calibrated" if start else "start"
        self.recent = Recent(rate, len(taus))
        self._detector = betting.ChangeDetector(rate, PATIENCE)

    @property
    def tau(self) -> float:
        """τ in force; 0: every answer is full depth's."""
        return float(self.evidence.taus[self.index])

    @property
    def reason(self) -> Reason:
        """Why τ is what it is; see the class."""
        return "recent" if self.index < self.proved else self._why

    def skip(self, share: float, texts: int) -> None:
        """Count texts that were not drawn."""
        self.evidence.skip(share, texts)
        if self.proved:
            self._detector.skip(share, texts)

    def add(self, share: float, audit: Profile, served_differs: bool = False) -> bool:
        """Count an audit; whether τ changed."""
        before = self.index
        self.evidence.add(share, audit, served_differs)
        self.recent.add(audit.differs)
        if self.proved:
            self._detector.add(share, bool(audit.differs[self.proved]))
            if self._detector.has_fired:
                self.reset("change")
                return True
        self._raise()
        return self.index != before

    def _raise(self) -> None:
        while self.proved + 1 < len(self.evidence.taus) and self._may_pass(self.proved + 1):
            self.proved += 1
            self._why = "evidence"
        self.index = self.recent.allows(self.proved)

    def _may_pass(self, index: int) -> bool:
        e_value = self.evidence.e_values(self.rate, slice(index, index + 1))[0]
        return bool(e_value >= 1 / (1 - CONFIDENCE))

    def reset(self, reason: Reason) -> None:
        """Forget what is known, and answer at full depth again."""
        self.evidence = Evidence(self.evidence.taus)
        self.recent = Recent(self.rate, len(self.evidence.taus))
        self.proved = self.index = self._start = 0
        self._why = reason
        self._detector = betting.ChangeDetector(self.rate, PATIENCE)

    def adopt(self, evidence: Evidence) -> None:
        """Begin with evidence that was gathered without this promise: τ rises as far as it allows."""
        self.evidence = evidence
        self._raise()

    def kept(self) -> "Kept":
        """What `restore` needs besides the evidence."""
        taus, recent = self.evidence.taus, self.recent
        return Kept(
            *(self.rate, float(taus[self.proved]), float(taus[self._start]), self._why),
            *(self._detector.wealth.tolist(), recent.weight, recent.differing.tolist()),
        )

    def restore(self, evidence: Evidence, kept: "Kept") -> None:
        """Go on where another left off. What had been proved of another rate, or from a start that this one has not, is
        proved anew, by the evidence.

        Raises ValueError for a τ that is not of the grid, and for values that cannot be.
        """
        if kept.rate != self.rate or kept.start > evidence.taus[self._start]:
            self.adopt(evidence)
            return
        self._start = int(np.searchsorted(evidence.taus, kept.start))
        match = np.flatnonzero(evidence.taus == kept.tau)
        wealth, differing = np.array(kept.detector, np.float64), np.array(kept.recent, np.float64)
        fits = len(match) == 1 and wealth.shape == self._detector.wealth.shape
        fits &= differing.shape == evidence.taus.shape and bool((differing <= kept.weight).all())
        if not fits or not (wealth >= 0).all() or not (differing >= 0).all():
            raise ValueError("what was promised does not fit the τ")
        self.evidence, self.proved, self._why = evidence, int(match[0]), kept.reason
        self._detector.wealth = wealth
        self.recent.weight, self.recent.differing = kept.weight, differing
        self.index = self.recent.allows(self.proved)
