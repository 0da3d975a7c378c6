"""Online risk control: chooses τ from the disagreement that audits of live traffic find.

An audit runs a text to full depth and shows, without a label, what every τ would have answered (`profiles`). `Evidence`
counts disagreements by τ. `Guarantee` raises τ as long as the evidence shows that the rate of answers that differ from
full depth stays within the guaranteed rate, and resets it when the rate has risen. A server keeps a guarantee for each
of its tenants, on the audits of that tenant alone.

The values of τ are tested in a fixed order, ascending from 0, which makes this a single test: τ moves to the next value
only once the e-value against "the rate at that value is above the guarantee" has reached 1/δ. From the start or a reset
until the traffic changes, the probability that τ ever reaches a value whose rate is above the guarantee is at most δ.

It takes many audits to distinguish a small change in the traffic from chance. Therefore τ is also lowered, without a
test, as soon as the rate of disagreement in recent audits is less than a standard error below the guaranteed rate
(`RecentRates`), and all evidence is discarded when the change detector fires.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from de3.exits import betting
from de3.exits.bound import CONFIDENCE
from de3.exits.criteria import Failures

# Mean number of audits before a false alarm at exactly the guaranteed rate; far more at a lower rate.
PATIENCE = 1e5
MAX_SHARES = 128  # tallies in an Evidence; a server has about twenty, one that learns up to about 50
# Length of the window of recent audits: those of the last RECENT_TEXTS texts, but at least MIN_RECENT, and enough to
# expect MIN_EXPECTED disagreements at the guaranteed rate.
RECENT_TEXTS, MIN_RECENT, MIN_EXPECTED = 1200, 300, 6

Reason = Literal["start", "evidence", "recent", "change", "reset"]


def error_of(attempt: int) -> float:
    """The error probability of a guarantee for the exits of one fit. attempt: number of the fit, from 1.

    A server that fits exits again tests each version separately. The error probabilities of all attempts sum to
    1 − CONFIDENCE, so the probability that any version ever breaks the guarantee is at most that.
    """
    return (1 - CONFIDENCE) / (attempt * (attempt + 1))


class SavedGuarantee(NamedTuple):
    """The saved state of a guarantee, apart from its evidence.

    Attributes:
        rate: the guaranteed rate.
        tau: the last proved τ.
        reason: see Guarantee.
        detector: wealth of the change detector.
        weight, recent: `weight` and `differing` of RecentRates.
        error: δ.
    """

    rate: float
    tau: float
    reason: Reason
    detector: list[float]
    weight: float
    recent: list[float]
    error: float = 1 - CONFIDENCE


class Audited(NamedTuple):
    """A text that ran to full depth: where it would exit at each τ, and whether it would then fail.

    Attributes:
        scores: at each exit; None at an exit without one.
        failures: by criterion of the model, the exits at which the text fails; see exits.criteria.
        blocked: the exits whose answer is flagged, at which it does not exit; empty without a flag.
        costs: cost of an answer at each exit; empty: those of the model. A text in windows has exits of its own, one
            for each set of windows' exits that some τ leads to (exits.windows.exits_of).
    """

    scores: Sequence[float | None]
    failures: Sequence[Failures]
    blocked: Sequence[bool] = ()
    costs: Sequence[int] = ()

    def of(self, criterion: int, exits: int, costs: Sequence[int]) -> "_Row | None":
        """The text as one criterion sees it, with as many exits; None if that is not about it.

        Exits are added before its own: it is never sure enough to leave there. costs: of the model's exits.
        """
        if (fails := self.failures[criterion]) is None:
            return None
        more = exits - len(self.scores)
        own = self.costs or costs
        return _Row(
            [*[None] * more, *self.scores],
            [*[False] * more, *fails],
            [*[False] * more, *(self.blocked or [False] * len(fails))],
            [*[own[-1]] * more, *own],
        )


class _Row(NamedTuple):
    scores: list[float | None]
    fails: list[bool]
    blocked: list[bool]
    costs: list[int]


class Profiles(NamedTuple):
    """The results for N texts at each τ of a grid, (N, G): disagreement with full depth, and exit layer."""

    differs: NDArray[np.bool_]
    layers: NDArray[np.int64]


def profiles(
    scores: Sequence[Sequence[float | None]] | betting.Floats,
    differs: Sequence[Sequence[bool]] | NDArray[np.bool_],
    layers: Sequence[int] | Sequence[Sequence[int]] | betting.Floats,
    taus: NDArray[np.float64],
    blocked: Sequence[Sequence[bool]] | NDArray[np.bool_] | None = None,
) -> Profiles:
    """Apply the exit rule (`exits.rule`), at each τ of a grid, to texts that were run to full depth.

    scores: scores by text and exit, (N, E); None or NaN at an exit without a score. differs: disagreement of each exit
    with the last one, (N, E). layers: layers of the exits, of all texts or by text, (E,) or (N, E). taus: the grid,
    (G,). blocked: where a text that would exit runs to the last layer, (N, E); None: nowhere.
    """
    costs = np.array(layers)
    shape = len(scores), costs.shape[-1]
    below = np.array(scores, np.float64).reshape(shape)[:, :-1]
    least = np.minimum.accumulate(np.where(np.isnan(below), np.inf, below), 1)
    index = (least[:, :, None] >= taus).sum(1)
    if blocked is not None:
        is_deep = np.array(blocked, np.bool_).reshape(shape)
        index = np.where(np.take_along_axis(is_deep, index, 1), shape[1] - 1, index)
    unlike = np.array(differs, np.bool_).reshape(shape)
    return Profiles(
        np.take_along_axis(unlike, index, 1), np.take_along_axis(np.broadcast_to(costs, shape), index, 1)
    )


def profiles_of(
    texts: Sequence[Audited], criterion: int, costs: Sequence[int], taus: NDArray[np.float64]
) -> tuple[NDArray[np.int64], Profiles]:
    """The indices of the texts that a criterion is about, (m,), and their results at each τ, (m, G).

    criterion: its index. costs: of the model's exits.
    """
    exits = max((len(text.scores) for text in texts), default=len(costs))
    rows = [text.of(criterion, exits, costs) for text in texts]
    about = [i for i, row in enumerate(rows) if row is not None]
    found = [row for row in rows if row is not None]
    scores, fails, blocked, each = zip(*found, strict=True) if found else ((), (), (), [costs])
    return np.array(about, np.int64), profiles(scores, fails, each, taus, blocked)


@dataclass(slots=True)
class Tally:
    """Counts of the texts with one audit probability.

    Attributes:
        texts: number of texts, audited or not.
        audits: number of audited texts.
        served: number of audited texts whose answer, as served, differs from full depth's.
        differing: number of audited texts whose answer at each τ would differ, (G,).
        layers: sum of the audited texts' exit layers at each τ, (G,).
        repeats: the repeated texts among `differing`, (G,); they are not counted in `texts`, `audits` and `layers`.
    """

    texts: int
    audits: int
    served: int
    differing: NDArray[np.int64]
    layers: NDArray[np.int64]
    repeats: NDArray[np.int64]


@dataclass
class Evidence:
    """The audits of one model and signal so far.

    The methods that count raise ValueError for a q outside (0, 1], and for more than MAX_SHARES different q.

    Attributes:
        taus: the grid, (G,), ascending from 0.
        tallies: counts by audit probability q.
    """

    taus: NDArray[np.float64]
    tallies: dict[float, Tally] = field(default_factory=dict)

    def skip(self, share: float, texts: int) -> None:
        """Count texts that were not audited. share: q, the audit probability of these texts."""
        if texts:
            self._tally(share).texts += texts

    def add(self, share: float, audits: Profiles, served: int = 0) -> None:
        """Count audits. share: their probability. served: see `Tally.served`."""
        tally = self._tally(share)
        tally.texts += len(audits.differs)
        tally.audits += len(audits.differs)
        tally.served += served
        tally.differing = tally.differing + audits.differs.sum(0)
        tally.layers = tally.layers + audits.layers.sum(0)

    def add_repeats(self, share: float, differs: NDArray[np.bool_]) -> None:
        """Count audits of texts that were counted before, (N, G); each counts only against a τ at which it differs."""
        tally = self._tally(share)
        tally.differing = tally.differing + differs.sum(0)
        tally.repeats = tally.repeats + differs.sum(0)

    def _tally(self, share: float) -> Tally:
        if not 0 < share <= 1:
            raise ValueError(f"a share must be above 0 and at most 1, got {share}")
        if share not in self.tallies:
            if len(self.tallies) == MAX_SHARES:
                raise ValueError(f"at most {MAX_SHARES} shares are counted")
            zeros = np.zeros(len(self.taus), np.int64)
            # A new dictionary, as a report in another thread may be reading the old one.
            self.tallies = {**self.tallies, share: Tally(0, 0, 0, zeros, zeros.copy(), zeros.copy())}
        return self.tallies[share]

    @property
    def texts(self) -> int:
        """Number of texts, audited or not."""
        return sum(tally.texts for tally in self.tallies.values())

    @property
    def audits(self) -> int:
        """Number of audited texts."""
        return sum(tally.audits for tally in self.tallies.values())

    def served(self) -> float | None:
        """Rate of disagreement of the answers as served, each audit weighted by 1/q; None without audits."""
        tallies, weight = self.tallies, _weight(self.tallies)
        return sum(t.served / share for share, t in tallies.items()) / weight if weight else None

    def rates(self) -> betting.Floats:
        """Rate of disagreement at each τ, (G,), each audit weighted by 1/q; NaN without audits.

        Repeats count only in the numerator, so they can make the rate too high but not too low.
        """
        return self._mean(lambda tally: tally.differing)

    def mean_layers(self) -> betting.Floats:
        """Mean exit layer at each τ, (G,), each audit weighted by 1/q; NaN without audits."""
        return self._mean(lambda tally: tally.layers)

    def _mean(self, sums: Callable[[Tally], NDArray[np.int64]]) -> betting.Floats:
        tallies, weight = self.tallies, _weight(self.tallies)
        if not weight:
            return np.full(len(self.taus), np.nan)
        return np.asarray(sum(sums(tally) / share for share, tally in tallies.items()) / weight)

    def bounds(self, index: slice = slice(None)) -> tuple[betting.Floats, betting.Floats]:
        """Bounds on the rates at a slice of the τ grid, anytime-valid with 95% confidence for each τ.

        The bets weight audits differently from rates(), so a rate may lie outside its bounds, which are then widened.
        """
        lower, upper = betting.bounds(*self._counts(index), CONFIDENCE)
        if not self.audits:
            return lower, upper
        rates = self.rates()[index]
        return np.minimum(lower, rates), np.maximum(upper, rates)

    def e_values(self, rate: float) -> betting.Floats:
        """E-values against "the rate at this τ is above `rate`", at each τ of the grid."""
        return betting.e_values(*self._counts(slice(None)), np.full(len(self.taus), rate))

    def e_value(self, rate: float, index: int) -> float:
        """E-value against "the rate at this τ is above `rate`", for one τ of the grid."""
        tallies = self.tallies.values()
        audits = sum(tally.audits + int(tally.repeats[index]) for tally in tallies)
        return betting.e_value(audits, sum(int(tally.differing[index]) for tally in tallies), rate)

    def e_value_above(self, rate: float, index: int) -> float:
        """E-value against "the rate at this τ is at most `rate`", for one τ of the grid."""
        counts = self._counts(slice(index, index + 1))
        return float(betting.e_values_above(*counts, np.full(1, rate))[0])

    def _counts(self, index: slice) -> tuple[betting.Counts, betting.Counts]:
        """The audits, including repeats that differ, and those that differ, each (G,)."""
        tallies, zeros = self.tallies.values(), np.zeros(len(self.taus[index]), np.int64)
        audits = sum((tally.audits + tally.repeats[index] for tally in tallies), zeros)
        return audits, sum((tally.differing[index] for tally in tallies), zeros)


def _weight(tallies: dict[float, Tally]) -> float:
    """Number of texts that the audits represent."""
    return sum(tally.audits / share for share, tally in tallies.items())


class RecentRates:
    """Exponentially weighted rates of disagreement in recent audits, by τ.

    While a large share of the texts is audited, the window holds more audits: the rates are then more precise, and
    still follow the traffic as quickly.

    Attributes:
        weight: total weight of the audits; approaches the length of the window.
        differing: total weight of the audits whose answer at each τ would differ, (G,).
    """

    def __init__(self, rate: float, count: int) -> None:
        """rate: the guaranteed rate. count: number of values of τ, G."""
        self._rate, self._least = rate, max(MIN_RECENT, MIN_EXPECTED / rate)
        self.weight, self.differing = 0.0, np.zeros(count)

    def add(self, share: float, differs: NDArray[np.bool_]) -> None:
        """Count audits in order.

        share: probability of an audit, which sets the length of the window; 0 selects the shortest. differs:
        disagreement of each audit at each τ, (N, G).
        """
        window = max(self._least, share * RECENT_TEXTS)
        # If the share falls, the window shrinks, and older audits lose weight immediately.
        older = window / max(window, self.weight)
        stays = (1.0 - 1.0 / window) ** np.arange(len(differs), -1.0, -1.0)
        self.weight = float(self.weight * older * stays[0] + stays[1:].sum())
        self.differing = self.differing * older * stays[0] + stays[1:] @ differs

    def allows(self, index: int) -> int:
        """Index of the highest τ that the recent audits allow, at most `index`.

        Up to this τ, every recent rate is at least a standard error below the guaranteed rate. Returns 0 if there is no
        such τ, and `index` itself while there are too few audits to judge.
        """
        if self.weight < self._least / 3:
            return index
        error = math.sqrt(self._rate * (1 - self._rate) / max(self.weight, self._least))
        above = self.differing[: index + 1] > (self._rate - error) * self.weight
        return max(0, int(above.argmax()) - 1) if above.any() else index


class Guarantee:
    """Chooses τ so that the rate of answers that differ from full depth stays within `rate`.

    Attributes:
        evidence: audits since the start, or the last change or reset.
        proved: index of the last proved τ.
        index: index of the current τ, at most `proved`.
        reason: start (τ = 0, without evidence), evidence (raised by audits), recent (lowered by recent audits), change
            (the rate had risen; evidence discarded) or reset (by an admin).
    """

    def __init__(self, rate: float, taus: NDArray[np.float64], error: float = 1 - CONFIDENCE) -> None:
        """taus: the grid, (G,), ascending from 0. error: δ. Raises ValueError for a rate outside (0, 1)."""
        if not 0 < rate < 1:
            raise ValueError(f"a guaranteed rate must be above 0 and below 1, got {rate}")
        self.rate, self.error = rate, error
        self._start(taus, "start")

    def _start(self, taus: NDArray[np.float64], reason: Reason) -> None:
        self.evidence = Evidence(taus)
        self.recent = RecentRates(self.rate, len(taus))
        self.proved = self.index = 0
        self._why = reason
        self._detector = betting.ChangeDetector(self.rate, PATIENCE)

    @property
    def tau(self) -> float:
        """The current τ; at 0, every text runs to full depth."""
        return float(self.evidence.taus[self.index])

    @property
    def reason(self) -> Reason:
        """The reason for τ; see the class."""
        return "recent" if self.index < self.proved else self._why

    def count(
        self,
        share: float,
        audits: Profiles,
        repeats: NDArray[np.bool_] | None = None,
        window_share: float | None = None,
    ) -> None:
        """Count audits. They may lower τ; only `advance` raises it.

        share: the probability with which each text was drawn. window_share: the same for the recent audits, if `share`
        is not that of all texts. audits: the profiles of the texts, in order. repeats: for
        each text, whether it was counted before, or is near to one that the exits were fitted to.

        As evidence, a repeat counts only against each τ at which it differs. The recent audits and the change detector
        count it like any other text: without the repeats that agree, their rates would be too high.
        """
        if repeats is None or not repeats.any():
            self.evidence.add(share, audits)
        else:
            self.evidence.add(share, Profiles(audits.differs[~repeats], audits.layers[~repeats]))
            self.evidence.add_repeats(share, audits.differs[repeats])
        # At τ = 0 every text is audited, but at the next τ only some are. A share of 0 keeps the window as short as it
        # is at the next τ.
        drawn = share if window_share is None else window_share
        self.recent.add(drawn if self.index else 0.0, audits.differs)
        if self.proved and self._detector.count(audits.differs[:, self.proved].tolist()):
            self.reset("change")
            return
        self.index = min(self.index, self.recent.allows(self.proved))

    def advance(self) -> None:
        """Raise τ as far as the evidence and the recent audits allow."""
        while self.proved + 1 < len(self.evidence.taus) and self._may_pass(self.proved + 1):
            self.proved += 1
            self._why = "evidence"
        self.index = self.recent.allows(self.proved)

    def _may_pass(self, index: int) -> bool:
        return self.evidence.e_value(self.rate, index) >= 1 / self.error

    def reset(self, reason: Reason) -> None:
        """Discard the evidence, and return to τ = 0."""
        self._start(self.evidence.taus, reason)

    def saved(self) -> SavedGuarantee:
        """The state to save for `restore`, apart from the evidence."""
        taus, recent = self.evidence.taus, self.recent
        return SavedGuarantee(
            rate=self.rate,
            tau=float(taus[self.proved]),
            reason=self._why,
            detector=list(self._detector.wealth),
            weight=recent.weight,
            recent=recent.differing.tolist(),
            error=self.error,
        )

    def restore(self, evidence: Evidence, saved: SavedGuarantee) -> None:
        """Continue from a saved state.

        If the saved rate differs from this guarantee's, or the saved δ is higher, only the evidence is used. Otherwise
        raises ValueError if the saved τ is not on the grid, and for impossible values.
        """
        if saved.rate != self.rate or saved.error > self.error:
            self.evidence = evidence
            self.advance()
            return
        match = np.flatnonzero(evidence.taus == saved.tau)
        wealth, differing = list(saved.detector), np.array(saved.recent, np.float64)
        fits = len(match) == 1 and len(wealth) == len(self._detector.wealth)
        fits &= differing.shape == evidence.taus.shape
        is_possible = (differing >= 0).all() and (differing <= saved.weight * (1 + 1e-9)).all()
        if not fits or min(wealth) < 0 or not is_possible:
            raise ValueError("the saved guarantee does not match the τ grid")
        self.evidence, self.proved, self._why = evidence, int(match[0]), saved.reason
        self._detector.wealth = wealth
        self.recent.weight, self.recent.differing = saved.weight, differing
        self.index = self.recent.allows(self.proved)
