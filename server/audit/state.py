"""Keeps audit results across restarts, in a small file for each tenant of a model."""

import fcntl
import glob
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from de3.exits.guarantee import MAX_SHARES, Evidence, Guarantee, Reason, SavedGuarantee, Tally
from de3.model_store.manifest import fingerprint
from de3.model_store.regular_file import read_regular_file, write_private_file
from de3.server.audit.ledger import Ledger
from de3.server.audit.tenant import MAX_RESETS, Reset

log = logging.getLogger("de3")
MAX_BYTES = 2**22
MAX_TAUS = 1024
MAX_TIME = 2**38  # seconds since 1970, in the year 10680
MAX_TENANTS = 512  # files of a model: those of current tenants, and some of former ones
NEW_SHARES = 64  # shares that a server may still add to a restored state
MAX_COUNT, NEW_COUNT = 2**53, 2**52  # largest count, and how much of it a server may add

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Rate = Annotated[float, Field(ge=0, le=1)]


MAX_CRITERIA = 8


class _Part(BaseModel):
    """Base class of the parts of a state file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Counts(_Part):
    """A saved de3.exits.guarantee.Tally, and its share."""

    share: Annotated[float, Field(gt=0, le=1)]
    texts: Count
    audits: Count
    served: Count
    differing: list[Count] = Field(max_length=MAX_TAUS)
    layers: list[Count] = Field(max_length=MAX_TAUS)
    repeats: list[Count] = Field(max_length=MAX_TAUS)

    def check(self, taus: int) -> None:
        """Raise ValueError for impossible counts. taus: length of the grid."""
        if not len(self.differing) == len(self.layers) == len(self.repeats) == taus:
            raise ValueError("differing, layers and repeats must have a number for each τ")
        first = [d - r for d, r in zip(self.differing, self.repeats, strict=True)]
        if max(self.served, self.audits) > self.texts or max(first, default=0) > self.audits:
            raise ValueError("more audits than texts, or more disagreements than audits")
        if min(first, default=0) < 0:
            raise ValueError("more disagreements of repeats than of all texts")


class GuaranteeState(_Part):
    """The state of a tenant's guarantee; see de3.exits.guarantee.SavedGuarantee."""

    counts: list[Counts] = Field(max_length=MAX_SHARES)
    rate: Annotated[float, Field(gt=0, lt=1)]
    tau: Rate
    reason: Reason
    detector: list[Annotated[float, Field(ge=0)]] = Field(max_length=MAX_TAUS)
    weight: Annotated[float, Field(ge=0)]
    recent: list[Annotated[float, Field(ge=0)]] = Field(max_length=MAX_TAUS)
    error: Rate


class CriterionState(_Part):
    """The state of a de3.server.audit.tenant.Bounded."""

    counts: list[Counts] = Field(max_length=MAX_SHARES)
    guarantee: GuaranteeState | None

    def all_counts(self) -> list[list[Counts]]:
        """The counts of all audits, and those that the guarantee rests on."""
        return [self.counts, *([] if self.guarantee is None else [self.guarantee.counts])]


class ResetRow(_Part):
    """A saved de3.server.audit.tenant.Reset."""

    at: Annotated[float, Field(ge=0, le=MAX_TIME)]
    reason: Reason
    tau: Rate
    audits: Count


class TenantState(_Part):
    """Saved audits of a tenant; valid only for the same model files, runtime, OOD policy, signal, flag and grid of τ.

    tau_factor: factor applied to the τ of out-of-distribution texts. flag: see Flag.key; empty: none.
    """

    schema_version: Literal[3] = 3
    model: str
    tenant: Annotated[str, Field(max_length=64)]
    fingerprint: str
    runtime: str
    tau_factor: float
    signal: str
    lam: float | None
    flag: str = ""
    taus: list[Rate] = Field(max_length=MAX_TAUS)
    since: Annotated[float, Field(ge=0, le=MAX_TIME)]
    counts: list[Counts] = Field(max_length=MAX_SHARES)
    guarantee: GuaranteeState | None  # None without a guarantee
    criteria: dict[str, CriterionState] = Field(
        default={}, max_length=MAX_CRITERIA
    )  # those after the first, by name
    # The criterion "missed", in files of earlier releases.
    missed_counts: list[Counts] = Field(default=[], max_length=MAX_SHARES, exclude=True)
    missed_guarantee: GuaranteeState | None = Field(default=None, exclude=True)
    resets: list[ResetRow] = Field(max_length=MAX_RESETS)

    @model_validator(mode="after")
    def _check(self) -> "TenantState":
        if self.missed_counts or self.missed_guarantee:
            missed = CriterionState(counts=self.missed_counts, guarantee=self.missed_guarantee)
            self.criteria.setdefault("missed", missed)
        for row in self.all_counts():
            row.check(len(self.taus))
        return self

    def all_counts(self) -> list[Counts]:
        """The counts of all audits, and those that the guarantees rest on."""
        return [row for one in self.by_criterion() for counts in one.all_counts() for row in counts]

    def by_criterion(self) -> list[CriterionState]:
        """The state of every criterion, the first one included."""
        return [CriterionState(counts=self.counts, guarantee=self.guarantee), *self.criteria.values()]


def state_of(ledger: Ledger, name: str) -> TenantState:
    """The state of a tenant, to be saved."""
    tenant = ledger.tenants[name]
    first, *others = [
        CriterionState(counts=_counts_of(one.evidence), guarantee=_saved(one.guarantee))
        for one in tenant.criteria
    ]
    return TenantState(
        model=ledger.manifest.full_name,
        tenant=name,
        fingerprint=fingerprint(ledger.manifest),
        runtime=ledger.runtime,
        tau_factor=ledger.tau_factor,
        signal=ledger.signal.name,
        lam=ledger.signal.lam,
        flag=_flag_of(ledger),
        taus=ledger.taus.tolist(),
        since=tenant.since,
        counts=first.counts,
        guarantee=first.guarantee,
        criteria=dict(zip((one.criterion.name for one in tenant.criteria[1:]), others, strict=True)),
        resets=[ResetRow(**asdict(reset)) for reset in tenant.resets],
    )


def _flag_of(ledger: Ledger) -> str:
    return "" if (flag := ledger.limits.flag) is None else flag.key


def _saved(guarantee: Guarantee | None) -> GuaranteeState | None:
    if guarantee is None:
        return None
    return GuaranteeState(counts=_counts_of(guarantee.evidence), **guarantee.saved()._asdict())


def _counts_of(evidence: Evidence) -> list[Counts]:
    return [
        Counts(share=share, **{name: np.asarray(value).tolist() for name, value in asdict(tally).items()})
        for share, tally in list(evidence.tallies.items())
    ]


def _evidence(counts: list[Counts], taus: NDArray[np.float64]) -> Evidence:
    evidence = Evidence(taus)
    for row in counts:
        arrays = (np.array(part, np.int64) for part in (row.differing, row.layers, row.repeats))
        evidence.tallies[row.share] = Tally(row.texts, row.audits, row.served, *arrays)
    return evidence


def restore(ledger: Ledger, state: TenantState) -> None:
    """Restore a tenant of a ledger from a state.

    Raises ValueError if the state belongs to another model, signal, runtime, OOD policy or grid of τ, or if its shares
    or counts are too close to their limits.
    """
    manifest, signal, taus = ledger.manifest, ledger.signal, ledger.taus
    if state.fingerprint != fingerprint(manifest):
        raise ValueError("it belongs to another model")
    if (state.signal, state.lam) != (signal.name, signal.lam):
        raise ValueError("it belongs to another signal")
    if state.flag != _flag_of(ledger):
        raise ValueError("it belongs to another flag")
    if (state.runtime, state.tau_factor) != (ledger.runtime, ledger.tau_factor):
        raise ValueError("it belongs to another runtime, or another --ood-policy")
    shares = [len(counts) for one in state.by_criterion() for counts in one.all_counts()]
    if max(shares) + NEW_SHARES > MAX_SHARES:
        raise ValueError("it has too many shares")
    if max((count for row in state.all_counts() for count in _all(row)), default=0) > MAX_COUNT - NEW_COUNT:
        raise ValueError("its counts are too large")
    if state.taus != taus.tolist():
        raise ValueError("it has a different grid of τ")
    tenant = ledger.new_tenant()
    tenant.since = state.since
    saved = [
        state.by_criterion()[0],
        *(state.criteria.get(one.criterion.name) for one in tenant.criteria[1:]),
    ]
    for each, found in zip(tenant.criteria, saved, strict=True):
        if found is not None:
            each.evidence = _evidence(found.counts, taus)
            _restore(each.guarantee, found.guarantee, taus)
    tenant.resets = [Reset(**row.model_dump()) for row in state.resets]
    ledger.restore(state.tenant, tenant)


def _restore(guarantee: Guarantee | None, saved: GuaranteeState | None, taus: NDArray[np.float64]) -> None:
    if guarantee is not None and saved is not None:
        fields = saved.model_dump(exclude={"counts"})
        guarantee.restore(_evidence(saved.counts, taus), SavedGuarantee(**fields))


def _all(row: Counts) -> Iterator[int]:
    """Every count that grows with further texts."""
    yield from (row.texts, row.audits, row.served, *row.differing, *row.layers, *row.repeats)


class StateDir:
    """The folder of the state files. Only one server can use it at a time."""

    def __init__(self, path: Path) -> None:
        """Create and lock the folder; raises ValueError if it cannot be written, or another server uses it."""
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(f"state_dir: {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ValueError(f"state_dir: another server uses {path}; each needs its own") from None

    def close(self) -> None:
        """Release the folder, which another server can then use."""
        os.close(self._lock)

    def _file(self, ledger: Ledger, tenant: str) -> Path:
        name = ledger.manifest.full_name.replace(":", "-")
        return self.path / (f"{name}@{tenant}.json" if tenant else f"{name}.json")

    def forget(self, name: str) -> None:
        """Remove the files of all versions of a model name; raises no error if one cannot be removed."""
        is_own = re.compile(rf"{re.escape(name)}-\d+(@.*)?\.json")
        for path in self.path.glob(f"{glob.escape(name)}-*.json"):
            if is_own.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()

    def read(self, ledger: Ledger) -> None:
        """Restore a ledger from its tenants' files; an unusable file is renamed, with a warning."""
        own = self._file(ledger, "")
        others = self.path.glob(f"{glob.escape(own.stem)}@*.json")
        newest = sorted(others, key=lambda path: path.lstat().st_mtime, reverse=True)[:MAX_TENANTS]
        paths = [own, *newest]
        audits = 0
        for path in paths:
            try:
                state = TenantState.model_validate_json(read_regular_file(path, MAX_BYTES))
                if path != self._file(ledger, state.tenant):
                    raise ValueError("it belongs to another tenant")
                restore(ledger, state)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                aside = path.with_suffix(".json.old")
                log.warning(
                    "%s cannot be used (%s); audits start from zero; kept as %s", path, what, aside.name
                )
                with suppress(OSError):
                    path.replace(aside)
            else:
                tenant = ledger.tenants[state.tenant]
                # The guarantee may also rest on texts that were recorded before the model was served.
                held = max((one.evidence.audits for one in tenant.guarantees[:1]), default=0)
                audits += max(tenant.evidence.audits, held)
        if ledger.tenants:
            log.info(
                "%s: %d audits of %d tenants from %s",
                ledger.manifest.full_name,
                audits,
                len(ledger.tenants),
                self.path,
            )

    def write(self, ledger: Ledger) -> None:
        """Write the state of each tenant that has changed, atomically; raises OSError.

        Any thread may call this, but only one at a time.
        """
        for name, tenant in list(ledger.tenants.items()):
            if tenant.is_changed:
                tenant.is_changed = False  # first, so that no later change is missed
                try:
                    content = state_of(ledger, name).model_dump_json().encode()
                    write_private_file(self._file(ledger, name), content)
                except Exception:
                    tenant.is_changed = True
                    raise
