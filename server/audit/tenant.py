"""Audits of one tenant of a model, and the τ that they allow with a guarantee.

A tenant is the name of an API key; a server without keys has a single one, whose name is empty. Everything that decides
a tenant's τ is here, so nothing that another tenant sends can change it.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from de3.exits.guarantee import Evidence, Guarantee, Profiles, Reason, profiles

MAX_SEEN = 2**18  # hashes of counted texts that a model remembers, over all tenants
MOST_SEEN = 2**16  # hashes that it remembers for one tenant; when full, the older half is forgotten
MAX_RESETS = 20  # resets kept for the report


@dataclass(slots=True)
class Settled:
    """Consecutive texts of one tenant, all drawn with the same probability; some were audited.

    Attributes:
        epoch: epoch of the tenant's evidence in which the texts were drawn; see Tenant.
        share: the probability with which each text was drawn.
        skipped: number of texts that were not audited.
        keys: with a guarantee, hash of each audited text; None if it is near to a text that the exits were fitted to.
        scores: score of each audited text at each exit; None at an exit without one.
        differs: disagreement of each audited text's exits with the last one.
        missed: of a token classifier, for each audited text, the exits that miss a span of the last one; None for a
            text without spans there. Empty for other models.
        served: number of audited texts whose answer, as sent, differs from the last exit's.
        may_rise: they end with the last text of a request, so τ may rise.
    """

    tenant: str
    epoch: int
    share: float
    skipped: int = 0
    keys: list[int | None] = field(default_factory=list)
    scores: list[list[float | None]] = field(default_factory=list)
    differs: list[list[bool]] = field(default_factory=list)
    missed: list[list[bool] | None] = field(default_factory=list)
    served: int = 0
    may_rise: bool = False

    @property
    def texts(self) -> int:
        """Number of texts, audited or not."""
        return self.skipped + len(self.scores)

    def add(
        self,
        key: int | None,
        scores: list[float | None],
        differs: list[bool],
        served_differs: bool,
        missed: Sequence[list[bool] | None] = (),
    ) -> None:
        """Add a text that was audited; see the attributes. missed: of this text, or empty."""
        self.keys.append(key)
        self.scores.append(scores)
        self.differs.append(differs)
        self.missed += missed
        self.served += served_differs

    def continues(self, other: "Settled") -> bool:
        """True if these texts can be appended to `other`, which was settled before."""
        return (self.tenant, self.epoch, self.share) == (other.tenant, other.epoch, other.share)

    def extend(self, later: "Settled") -> None:
        """Append later texts, which continue these."""
        self.skipped += later.skipped
        self.keys += later.keys
        self.scores += later.scores
        self.differs += later.differs
        self.missed += later.missed
        self.served += later.served
        self.may_rise = later.may_rise


def add_settled(texts: list[Settled], later: Iterable[Settled]) -> None:
    """Append later texts to a list, merging those that continue its last entry."""
    for one in later:
        if texts and one.continues(texts[-1]):
            texts[-1].extend(one)
        else:
            texts.append(one)


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset of a tenant's evidence.

    Attributes:
        at: seconds since 1970.
        tau: τ in force before the reset.
        audits: number of audits counted before the reset.
    """

    at: float
    reason: Reason
    tau: float
    audits: int


class Seen:
    """Remembers hashes of counted texts: at least the latest ones, half as many as there is room for."""

    def __init__(self) -> None:
        self._older, self._newer = set[int](), set[int]()

    def was_counted(self, key: int | None, room: int) -> bool:
        """True if this hash is remembered or None; otherwise remembers it. room: number of hashes, of both halves."""
        if key is None or key in self._newer:
            return True
        was_counted = key in self._older
        self._newer.add(key)
        if len(self._newer) >= room // 2:
            self._older, self._newer = self._newer, set()
        return was_counted


class Tenant:
    """The audits of one tenant.

    Attributes:
        evidence: all audits since the start, or the last change or reset.
        missed: of these, those of texts in which full depth finds a span, and the rate of those with one missed; None
            unless the model is a token classifier.
        guarantee: the test that chooses τ; None without a guarantee.
        missed_guarantee: the same for the second rate, of a token classifier: both must allow a τ.
        epoch: identifies the evidence: texts that were drawn in an earlier epoch do not count.
        since: start of the evidence, in seconds since 1970.
        resets: the latest resets.
        num_changes: number of changes found in the traffic.
        is_changed: these audits have changed since they were last saved.
    """

    def __init__(
        self,
        taus: NDArray[np.float64],
        guarantee: Guarantee | None,
        epoch: int,
        missed_guarantee: Guarantee | None = None,
        has_spans: bool = False,
    ) -> None:
        """taus: the grid, (G,), ascending from 0. has_spans: the model is a token classifier."""
        self.taus, self.guarantee, self.epoch = taus, guarantee, epoch
        self.missed_guarantee = missed_guarantee
        self.evidence = Evidence(taus)
        self.missed = Evidence(taus) if has_spans else None
        self.since = time.time()
        self.resets: list[Reset] = []
        self.num_changes = 0
        self.is_changed = False
        self._seen = Seen()
        self._has_new_audits = False  # new audits since the last check of whether τ may rise

    @property
    def index(self) -> int:
        """Index of the τ in force in the grid; 0 without a guarantee."""
        return 0 if self.guarantee is None else self.strictest(self.guarantee).index

    def strictest(self, guarantee: Guarantee) -> Guarantee:
        """The guarantee with the lower τ of the tenant's two, or its only one."""
        other = self.missed_guarantee
        return guarantee if other is None or guarantee.index <= other.index else other

    @property
    def _guarantees(self) -> list[Guarantee]:
        return [one for one in (self.guarantee, self.missed_guarantee) if one is not None]

    def count(self, one: Settled, layers: Sequence[int], room: int) -> bool:
        """Count texts; returns True if the rate had risen, which discards all evidence.

        layers: layers of the exits. room: number of hashes that this tenant may remember.
        """
        before, tau = self.evidence.audits, float(self.taus[self.index])
        found = profiles(one.scores, one.differs, layers, self.taus)
        self.is_changed = True
        self.evidence.skip(one.share, one.skipped)
        if one.scores:
            self.evidence.add(one.share, found, one.served)
        rows = [i for i, row in enumerate(one.missed) if row is not None]
        missed = profiles(
            [one.scores[i] for i in rows], [one.missed[i] or [] for i in rows], layers, self.taus
        )
        if self.missed is not None and rows:
            # All texts that the second rate is about are audited ones, whatever the share of audits is.
            self.missed.add(1.0, missed)
        if self.guarantee is None:
            return False
        repeats = self._repeats(one.keys, room)
        self.guarantee.count(one.share, found, repeats)
        if self.missed_guarantee is not None and rows:
            self.missed_guarantee.count(1.0, missed, repeats[rows])
        if any(each.reason == "change" and not each.evidence.tallies for each in self._guarantees):
            for each in self._guarantees:
                each.reset("change")
            self.num_changes += 1
            self._begin_anew(Reset(time.time(), "change", tau, before + len(one.scores)))
            return True
        self._has_new_audits |= bool(one.scores)
        if one.may_rise and self._has_new_audits:
            self._has_new_audits = False
            for each in self._guarantees:
                each.advance()
        return False

    def count_held_out(
        self,
        keys: Sequence[int | None],
        found: Profiles,
        room: int,
        missed: tuple[Sequence[int], Profiles] | None = None,
    ) -> None:
        """Count texts that were recorded before the model was served, toward the guarantee only.

        They are not audits of the model's answers, so reports leave them out. keys: see Settled. missed: of a token
        classifier, the texts (by index) in which full depth finds a span, and where one is missed.
        """
        assert self.guarantee is not None
        repeats = self._repeats(keys, room)
        self.guarantee.count(1.0, found, repeats)
        if self.missed_guarantee is not None and missed is not None and len(missed[0]):
            rows, where = missed
            self.missed_guarantee.count(1.0, where, repeats[list(rows)])
        for each in self._guarantees:
            each.advance()
        self.is_changed = True

    def _repeats(self, keys: Sequence[int | None], room: int) -> NDArray[np.bool_]:
        """For each audited text, True if it is not evidence for a higher τ; see Guarantee.count."""
        return np.array([self._seen.was_counted(key, room) for key in keys], np.bool_)

    def reset(self, epoch: int) -> None:
        """Discard the evidence at an admin's request; with a guarantee, τ returns to 0."""
        tau, audits = float(self.taus[self.index]), self.evidence.audits
        for each in self._guarantees:
            each.reset("reset")
        self.epoch = epoch
        self._begin_anew(Reset(time.time(), "reset", tau, audits))

    def _begin_anew(self, reset: Reset) -> None:
        # The evidence from the texts seen so far is discarded, so they may count again.
        self.evidence, self._seen = Evidence(self.taus), Seen()
        self.missed = None if self.missed is None else Evidence(self.taus)
        self.since, self.is_changed = reset.at, True
        self.resets = [*self.resets, reset][-MAX_RESETS:]
