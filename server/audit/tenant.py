"""Audits of one tenant of a model, and the τ that they allow with a guarantee.

A tenant is the name of an API key; a server without keys has a single one, whose name is empty. Everything that decides
a tenant's τ is here, so nothing that another tenant sends can change it.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from de3.exits.criteria import Criterion
from de3.exits.guarantee import Audited, Evidence, Guarantee, Profiles, Reason, profiles_of

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
        audited: the audited texts.
        served: number of audited texts whose answer, as sent, differs from the last exit's.
        may_rise: they end with the last text of a request, so τ may rise.
    """

    tenant: str
    epoch: int
    share: float
    skipped: int = 0
    keys: list[int | None] = field(default_factory=list)
    audited: list[Audited] = field(default_factory=list)
    served: int = 0
    may_rise: bool = False

    @property
    def texts(self) -> int:
        """Number of texts, audited or not."""
        return self.skipped + len(self.audited)

    def add(self, key: int | None, audited: Audited, served_differs: bool) -> None:
        """Add a text that was audited; see the attributes."""
        self.keys.append(key)
        self.audited.append(audited)
        self.served += served_differs

    def continues(self, other: "Settled") -> bool:
        """True if these texts can be appended to `other`, which was settled before."""
        return (self.tenant, self.epoch, self.share) == (other.tenant, other.epoch, other.share)

    def extend(self, later: "Settled") -> None:
        """Append later texts, which continue these."""
        self.skipped += later.skipped
        self.keys += later.keys
        self.audited += later.audited
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


class Bounded:
    """The evidence of a tenant about one criterion.

    Attributes:
        evidence: all audits of texts that the criterion is about, since the start, or the last change or reset.
        guarantee: the test of which τ keep its rate within the guarantee; None without one.
    """

    def __init__(self, criterion: Criterion, taus: NDArray[np.float64], error: float) -> None:
        """taus: the grid, (G,), ascending from 0. error: error probability of the test."""
        self.criterion, self.evidence, limit = criterion, Evidence(taus), criterion.limit
        self.guarantee = None if limit is None else Guarantee(limit, taus, error)

    def share(self, share: float) -> float:
        """The probability with which a text that it is about was drawn, if any text was with `share`."""
        # It is known only of audited texts whether a criterion of some texts is about them, so it counts just these.
        return share if self.criterion.of_all else 1.0


class Tenant:
    """The audits of one tenant.

    Attributes:
        criteria: the evidence about each criterion of the model; the first one is about all texts. All must allow a τ.
        epoch: identifies the evidence: texts that were drawn in an earlier epoch do not count.
        since: start of the evidence, in seconds since 1970.
        resets: the latest resets.
        num_changes: number of changes found in the traffic.
        is_changed: these audits have changed since they were last saved.
    """

    def __init__(self, taus: NDArray[np.float64], criteria: Sequence[Bounded], epoch: int) -> None:
        """taus: the grid, (G,), ascending from 0."""
        self.taus, self.criteria, self.epoch = taus, criteria, epoch
        self.since = time.time()
        self.resets: list[Reset] = []
        self.num_changes = 0
        self.is_changed = False
        self._seen = Seen()
        self._has_new_audits = False  # new audits since the last check of whether τ may rise

    @property
    def evidence(self) -> Evidence:
        """The evidence about all texts."""
        return self.criteria[0].evidence

    @property
    def guarantees(self) -> list[Guarantee]:
        """The tests that choose τ; none without a guarantee."""
        return [one.guarantee for one in self.criteria if one.guarantee is not None]

    @property
    def strictest(self) -> Guarantee | None:
        """The guarantee with the lowest τ, which is in force; None without any."""
        return min(self.guarantees, key=lambda one: one.index, default=None)

    @property
    def index(self) -> int:
        """Index of the τ in force in the grid; 0 without a guarantee."""
        return 0 if (strictest := self.strictest) is None else strictest.index

    def count(self, one: Settled, layers: Sequence[int], room: int) -> bool:
        """Count texts; returns True if a rate had risen, which discards all evidence.

        layers: layers of the exits. room: number of hashes that this tenant may remember.
        """
        before, tau = self.evidence.audits, float(self.taus[self.index])
        found = self._profiles(one.audited, layers)
        self.is_changed = True
        self.evidence.skip(one.share, one.skipped)
        for each, (rows, profile) in zip(self.criteria, found, strict=True):
            if len(rows):
                each.evidence.add(each.share(one.share), profile, one.served if each.criterion.of_all else 0)
        if not self.guarantees:
            return False
        self._test(one.keys, found, room, one.share)
        if any(test.reason == "change" and not test.evidence.tallies for test in self.guarantees):
            for test in self.guarantees:
                test.reset("change")
            self.num_changes += 1
            self._begin_anew(Reset(time.time(), "change", tau, before + len(one.audited)))
            return True
        self._has_new_audits |= bool(one.audited)
        if one.may_rise and self._has_new_audits:
            self._has_new_audits = False
            self._advance()
        return False

    def count_held_out(
        self, keys: Sequence[int | None], audited: Sequence[Audited], layers: Sequence[int], room: int
    ) -> None:
        """Count texts that were recorded before the model was served, toward the guarantee only.

        They are not audits of the model's answers, so reports leave them out. keys, audited: see Settled.
        """
        self._test(keys, self._profiles(audited, layers), room, 1.0)
        self._advance()
        self.is_changed = True

    def _profiles(
        self, audited: Sequence[Audited], layers: Sequence[int]
    ) -> list[tuple[NDArray[np.int64], Profiles]]:
        """For each criterion, the indices of the texts that it is about, and their results at each τ."""
        return [profiles_of(audited, k, layers, self.taus) for k in range(len(self.criteria))]

    def _test(
        self,
        keys: Sequence[int | None],
        found: Sequence[tuple[NDArray[np.int64], Profiles]],
        room: int,
        share: float,
    ) -> None:
        """Count texts toward the guarantees; one that was counted before is no evidence for a higher τ."""
        repeats = np.array([self._seen.was_counted(key, room) for key in keys], np.bool_)
        for each, (rows, profile) in zip(self.criteria, found, strict=True):
            if each.guarantee is not None and (each.criterion.of_all or len(rows)):
                each.guarantee.count(each.share(share), profile, repeats[rows], share)

    def _advance(self) -> None:
        for test in self.guarantees:
            test.advance()

    def reset(self, epoch: int) -> None:
        """Discard the evidence at an admin's request; with a guarantee, τ returns to 0."""
        tau, audits = float(self.taus[self.index]), self.evidence.audits
        for test in self.guarantees:
            test.reset("reset")
        self.epoch = epoch
        self._begin_anew(Reset(time.time(), "reset", tau, audits))

    def _begin_anew(self, reset: Reset) -> None:
        # The evidence from the texts seen so far is discarded, so they may count again.
        self._seen = Seen()
        for each in self.criteria:
            each.evidence = Evidence(self.taus)
        self.since, self.is_changed = reset.at, True
        self.resets = [*self.resets, reset][-MAX_RESETS:]
