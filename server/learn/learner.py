"""Learns exits for one model: keeps records of its traffic, and decides when to fit."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from de3.exits.calibration import times
from de3.model_store.manifest import LEARNED_FROM, base_of
from de3.model_store.records import Records, shape_of
from de3.model_store.store import Artifact
from de3.runtime.fit import Found, HeldOut
from de3.server.learn.journal import MAX_RESULTS, MAX_VOID, FitOutcome, LearnFolder, Result
from de3.server.learn.record import Record
from de3.server.learn.reservoir import Reservoir
from de3.server.settings import Settings

FIRST_FIT, GROWTH = 500, 1.5  # records; each further fit needs GROWTH times as many as the one before
MIN_RECORDS = 50
MAX_HELD = 4096
MAX_TESTS = 10_000  # held-out texts of a waiting version
SAVE_GROWTH = 1.25  # records are saved once their number has grown by this factor since the last save

Phase = Literal["recording", "fitting", "testing"]


@dataclass(frozen=True)
class InService:
    """The performance of a served version.

    Attributes:
        version: number of the version.
        speedup: speed-up in layers over the traffic, at the τ in force; 1: full depth.
    """

    version: int
    speedup: float


class Changes(NamedTuple):
    """The changes in the traffic that the audits of a served version have found.

    Attributes:
        version: number of the version.
        total: those that void what was learned; see Ledger.num_changes.
        by_tenant: those of each tenant's texts.
    """

    version: int
    total: int
    by_tenant: Mapping[str, int]


@dataclass
class Waiting:
    """A learned version that is not served yet, because its proved speed-up does not exceed that of the served version.

    Attributes:
        artifact: the version.
        current: the version that was current at the fit.
        found: the result of the fit.
        attempt: number of the fit.
        rows: the held-out texts that test its exits.
        after: number of the last record that may be among `rows`.
        count: value of Learner.count at that record.
    """

    artifact: Artifact
    current: int
    found: Found
    attempt: int
    rows: list[HeldOut]
    after: int
    count: int

    @property
    def next_test(self) -> int:
        """Value of Learner.count at which newer records also test the exits."""
        return self.count + max(MIN_RECORDS, len(self.rows) // 4)


class Learner:
    """The records and the fits of one model name.

    Attributes:
        artifact: the current version; all learned versions have the same weights.
        base: hash of these weights and the tokenizer; see base_of.
        phase: recording, fitting, or testing (the waiting version on newer records).
        is_restored: the saved records, if any, have been read.
        reservoir: the records in memory.
        count: number of records since the start or the last change in the traffic, including restored ones.
        next_fit: value of `count` at which the next fit starts.
        is_asked: an admin has asked for a fit.
        waiting: the last version that is not served yet; None if there is none. It is lost when the server ends.
        journal: the state that is kept across restarts, apart from the records.
    """

    def __init__(self, artifact: Artifact, folder: LearnFolder, settings: Settings) -> None:
        manifest = artifact.manifest
        self.artifact, self.name, self._folder = artifact, manifest.name, folder
        self.is_restored = False
        self.base = base_of(manifest)
        self.phase: Phase = "recording"
        self.is_asked, self._began, self._fitted = False, 0.0, 0
        self.waiting: Waiting | None = None
        self._held: list[Record] | None = []  # records held back (see hold); None: add at once
        self._observed: dict[int, Changes] = {}  # changes found so far, by version
        self._has_keys = settings.has_keys
        layers, hidden, labels, ids = shape_of(manifest)
        self.reservoir = Reservoir(self.base, (layers, hidden), labels, settings.learn_bytes, ids=ids)
        self.journal = folder.journal(self.name, self.base)
        if not self.journal.attempts and len(manifest.exit_layers) > 1:
            self.journal.attempts = 1  # the guarantee tests the model's own exits first
        self.count = self._saved = 0
        self._is_changed = False
        self.next_fit = FIRST_FIT

    def serve(self, artifact: Artifact) -> None:
        """Record the current version."""
        self.artifact, version = artifact, artifact.manifest.version
        if version <= LEARNED_FROM:
            self.journal.origin = version
        self._is_changed |= self.journal.current != version
        self.journal.current = version

    def restore(self, saved: Records | None) -> None:
        """Continue with saved records, or set them aside if they do not fit the model; None if there are none."""
        self.is_restored = True
        if saved is not None:
            try:
                self.reservoir.restore(saved)
            except ValueError as error:
                self._folder.set_aside_records(self.name, self.base, str(error))
            else:
                self._saved = int((saved.numbers >= self.journal.first_new).sum())
                self.count += self._saved
        while self.journal.attempts and self.next_fit <= self._saved:
            self.next_fit = int(GROWTH * self.next_fit)
        self.resume()

    def add(self, record: Record) -> None:
        """Keep a record, which may replace another one; it is discarded if MAX_HELD records are already held back."""
        self.count += 1
        if self._held is None:
            self.reservoir.add(record)
        elif len(self._held) < MAX_HELD:
            self._held.append(record)

    def hold(self) -> None:
        """Hold back new records until resume(), while another thread reads the reservoir."""
        self._held = []

    def resume(self, most: int = MAX_HELD) -> bool:
        """Add up to `most` of the records that were held back; returns True if more are left for the next call."""
        held = self._held or []
        for record in held[:most]:
            self.reservoir.add(record)
        self._held = held[most:] or None
        return self._held is not None

    @property
    def _next(self) -> int:
        """Number of the next record; those that are held back come before it."""
        held = sum(1 / one.share for one in self._held or [] if not one.is_extra)
        return int(self.reservoir.texts + held) + 1

    def observe(self, found: Changes) -> None:
        """Record the changes that the version in service has found. After one, the next fit needs new records."""
        before = self._observed.get(found.version, Changes(found.version, 0, {}))
        self._observed[found.version] = found
        if found.total > before.total:
            self.journal.first_new = self._next
            self.count, self.next_fit, self._is_changed = 0, FIRST_FIT, True
            self.waiting = None
            self.journal.void = {}
        for tenant, changes in found.by_tenant.items():
            if changes > before.by_tenant.get(tenant, 0):
                void = self.journal.void
                if len(void) >= MAX_VOID:
                    self.journal.first_new, void = self._next, {}
                # A new dictionary, as another thread may be writing the journal.
                self.journal.void = void | {tenant: self._next}
                self._is_changed = True

    def may_prove(self, row: HeldOut) -> bool:
        """True unless a held-out text is from before the last change of its tenant's traffic."""
        return row.number >= self.journal.void.get(row.client if self._has_keys else "", 0)

    @property
    def due_at(self) -> int:
        """Value of `count` at which the next fit starts: later if a version waits, which needs newer texts as tests."""
        return self.next_fit if self.waiting is None else int(GROWTH * self.next_fit)

    @property
    def is_due(self) -> bool:
        """True if a fit should start."""
        least = MIN_RECORDS if self.is_asked else self.due_at
        return self.phase == "recording" and self.is_restored and self.count >= least

    @property
    def is_test_due(self) -> bool:
        """True if newer records should test the waiting version."""
        waiting = self.waiting
        return self.phase == "recording" and waiting is not None and self.count >= waiting.next_test

    def wait_for_tests(self, waiting: Waiting) -> None:
        """Keep a version that is not served yet, until newer records have tested it."""
        self.waiting = waiting if len(waiting.rows) < MAX_TESTS else None

    @property
    def needs_saving(self) -> bool:
        """True if the journal has changed, or there are many new records since the last save."""
        return self._is_changed or self._has_grown

    @property
    def _has_grown(self) -> bool:
        return self.count >= max(FIRST_FIT, SAVE_GROWTH * self._saved)

    def save(self, all_records: bool = False) -> None:
        """Write the journal and, if all_records or there are many new ones, the records; raises OSError.

        The caller must hold back new records during this call; see hold.
        """
        all_records |= self._has_grown
        self._is_changed = False  # reset first, so that a failed save is not retried at once
        records = None
        if all_records and self.is_restored and len(self.reservoir) > 0:
            self._saved, records = self.count, self.reservoir.records()
        self._folder.write(self.name, self.journal, records)

    def save_journal(self) -> None:
        """Write the journal, if it has changed, but not the records; raises OSError."""
        if self._is_changed:
            self._is_changed = False
            self._folder.write(self.name, self.journal, None)

    def begin(self) -> int:
        """Record the start of a fit; returns its attempt number."""
        self.phase, self.is_asked, self.waiting = "fitting", False, None
        self._began, self._fitted = time.monotonic(), self.count
        while self.next_fit <= self.count:
            self.next_fit = int(GROWTH * self.next_fit)
        self.journal.attempts += 1
        return self.journal.attempts

    def end(self, result: Result) -> None:
        """Record the end of a fit or of a test, and the result of the fit."""
        self.phase = "recording"
        others = [one for one in self.journal.results if one.attempt != result.attempt]
        self.journal.results = [*others, result][-MAX_RESULTS:]
        self._is_changed = True

    def report(self) -> dict[str, Any]:
        """The state of the learner, as GET /v1/models/{name}/learn returns it."""
        latest = self.journal.results[-1] if self.journal.results else None
        return {
            "model": self.name,
            "phase": self.phase,
            "serving": self.artifact.manifest.version,
            "records": len(self.reservoir),
            "max_records": self.reservoir.capacity,
            "texts": round(self.reservoir.texts),
            "records_since_change": self.count,
            "next_fit_at": self.due_at,
            "message": self._message(latest),
            "fits": [one.model_dump(exclude_none=True) for one in reversed(self.journal.results)],
        }

    def _message(self, latest: Result | None) -> str:
        """The latest result and the next step, in words."""
        if self.phase == "testing" and latest is not None:
            return f"{sentence(latest)}; newer records test it now"
        if self.phase == "fitting":
            seconds = [one.seconds for one in self.journal.results if one.seconds]
            before = f" (the one before took {seconds[-1]:.0f} s)" if seconds else ""
            so_far = f"{time.monotonic() - self._began:.0f} s{before}"
            return f"fit {self.journal.attempts}, on {self._fitted} records, has run for {so_far}"
        after = f"the next fit starts after {max(0, self.due_at - self.count)} more records"
        if latest is None:
            return after
        result = sentence(latest)
        if latest.outcome == "served" and latest.version != self.artifact.manifest.version:
            result = result.replace("is served", "was served", 1)
        return f"{result}; {after}"


def sentence(result: Result) -> str:
    """The outcome of a fit in words."""
    if result.outcome == "failed":
        return f"fit {result.attempt} failed: {result.error}"
    found = result.speedup, result.proved_speedup, result.served_speedup
    allowed, proved, served = (times(one or 0.0) for one in found)  # None only if it failed
    measured = f"on {result.held_out} held-out records its exits allow {allowed} at the guarantee, and prove {proved}"
    if result.outcome == "waits":
        return f"fit {result.attempt} waits until newer texts prove more than the {served} that is served: {measured}"
    if result.outcome == "pinned":
        return f"fit {result.attempt} is not served, as another version is pinned: {measured}"
    if result.outcome == "served":
        return f"fit {result.attempt} is served as version {result.version}: {measured}"
    if result.outcome == "outdated":
        return (
            f"fit {result.attempt} is not served, as the traffic or the models changed meanwhile: {measured}"
        )
    return f"fit {result.attempt} is not faster than what is served ({served}): {measured}"


def result_of(
    attempt: int, found: Found, outcome: FitOutcome = "not_faster", version: int | None = None
) -> Result:
    """The result of a fit that ran. version: number of the new version, if there is one."""
    names = ("records", "held_out", "speedup", "proved_speedup", "served_speedup", "seconds")
    numbers = {name: getattr(found, name) for name in names}
    return Result(at=time.time(), attempt=attempt, outcome=outcome, version=version, **numbers)
