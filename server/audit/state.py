"""Keeps audit results across restarts, in a small file for each model."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from de3.exits.guarantee import CONFIDENCE
from de3.exits.promise import MAX_SHARES, Evidence, Promise, Reason, RecentRates, SavedPromise, Tally
from de3.exits.promises import ALL, MAX_CLIENTS, Promises
from de3.model_store.manifest import fingerprint
from de3.model_store.regular_file import read_regular_file
from de3.server.audit.ledger import MAX_RESETS, Ledger, Reset

log = logging.getLogger("de3")
MAX_BYTES = 2**22
MAX_TAUS = 1024
MAX_TIME = 2**38  # seconds since 1970: the year 10680
NEW_SHARES = 64  # shares that a server may still add to a restored state
MAX_COUNT, NEW_COUNT = 2**53, 2**52  # largest count, and the part of it that a server may add

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Rate = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    """Base class of the parts of a state file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Counts(_Part):
    """A saved de3.exits.promise.Tally, and its share."""

    share: Annotated[float, Field(gt=0, le=1)]
    texts: Count
    audits: Count
    served: Count
    differing: list[Count] = Field(max_length=MAX_TAUS)
    layers: list[Count] = Field(max_length=MAX_TAUS)


class PromiseCounts(_Part):
    """The part of a saved de3.exits.promise.Tally that a Promise needs, and its share."""

    share: Annotated[float, Field(gt=0, le=1)]
    texts: Count
    differing: list[Count] = Field(max_length=MAX_TAUS)
    repeats: list[Count] = Field(max_length=MAX_TAUS)


class OwnAudits(_Part):
    """A saved de3.exits.promise.RecentRates: the recent audits of one client."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    differing: list[Annotated[float, Field(ge=0)]] = Field(default=[], max_length=MAX_TAUS)


class Promised(_Part):
    """A saved de3.exits.promise.Promise: the fields of SavedPromise, and its evidence.

    left_out: the client whose evidence is left out; `ALL` (empty): none is. texts, own: that client's number of texts,
    and its recent audits.
    """

    left_out: Annotated[str, Field(max_length=16)]
    texts: Count
    counts: list[PromiseCounts] = Field(max_length=MAX_SHARES)
    rate: Rate
    tau: Rate
    start: Rate
    reason: Reason
    detector: list[Annotated[float, Field(ge=0)]] = Field(max_length=16)
    weight: Annotated[float, Field(ge=0)]
    recent: list[Annotated[float, Field(ge=0)]] = Field(max_length=MAX_TAUS)
    error: Rate = 1 - CONFIDENCE
    own: OwnAudits = OwnAudits()


class ResetRow(_Part):
    """A saved de3.server.audit.ledger.Reset."""

    at: Annotated[float, Field(ge=0, le=MAX_TIME)]
    reason: Reason
    tau: Rate
    audits: Count


class State(_Part):
    """Saved audits of a model; valid only for the same model files, runtime, OOD policy, signal and grid of τ.

    caution: factor applied to the τ of out-of-distribution texts.
    """

    schema_version: Literal[2] = 2
    model: str
    fingerprint: str
    runtime: str
    caution: float
    signal: str
    lam: float | None
    taus: list[Rate] = Field(max_length=MAX_TAUS)
    since: Annotated[float, Field(ge=0, le=MAX_TIME)]
    counts: list[Counts] = Field(max_length=MAX_SHARES)
    promises: list[Promised] = Field(max_length=MAX_CLIENTS + 2)  # empty without a guarantee
    resets: list[ResetRow] = Field(max_length=MAX_RESETS)

    @model_validator(mode="after")
    def _check(self) -> "State":
        for row in self.counts:
            if not len(row.differing) == len(row.layers) == len(self.taus):
                raise ValueError("differing and layers need a number for each τ")
            if max(row.served, row.audits, *row.differing) > row.texts or max(row.differing) > row.audits:
                raise ValueError("more audits than texts, or more disagreements than audits")
        for promise in self.promises:
            if promise.own.differing and len(promise.own.differing) != len(self.taus):
                raise ValueError("the recent audits of a client need a number for each τ")
            for part in promise.counts:
                if not len(part.differing) == len(part.repeats) == len(self.taus):
                    raise ValueError("differing and repeats need a number for each τ")
                first = [d - r for d, r in zip(part.differing, part.repeats, strict=True)]
                if min(first, default=0) < 0 or max(first, default=0) > part.texts:
                    raise ValueError("more disagreements than texts, or more of repeats than of all")
        names = [promise.left_out for promise in self.promises]
        if names and (ALL not in names or len(set(names)) < len(names)):
            raise ValueError("the promises must leave out different clients, and one of them none")
        return self


def state_of(ledger: Ledger) -> State:
    """The state of a ledger, to be saved."""
    manifest, promises = ledger.manifest, ledger.promises
    signal = ledger.signal
    return State(
        model=ledger.full_name,
        fingerprint=fingerprint(manifest),
        runtime=ledger.runtime,
        caution=ledger.caution,
        signal=signal.name,
        lam=signal.lam,
        taus=ledger.taus.tolist(),
        since=ledger.since,
        counts=[
            Counts(
                share=share,
                texts=tally.texts,
                audits=tally.audits,
                served=tally.served,
                differing=tally.differing.tolist(),
                layers=tally.layers.tolist(),
            )
            for share, tally in ledger.evidence.copy().tallies.items()
        ],
        promises=[] if promises is None else _promised(promises),
        resets=[ResetRow(at=r.at, reason=r.reason, tau=r.tau, audits=r.audits) for r in ledger.resets],
    )


def _promised(promises: Promises) -> list[Promised]:
    return [
        Promised(
            left_out=left_out,
            texts=promises.texts[left_out],
            counts=[
                PromiseCounts(
                    share=share,
                    texts=tally.texts,
                    differing=tally.differing.tolist(),
                    repeats=tally.repeats.tolist(),
                )
                for share, tally in promise.evidence.copy().tallies.items()
            ],
            **promise.saved()._asdict(),
            own=_own(promises, left_out),
        )
        for left_out, promise in list(promises.by_left_out.items())
    ]


def _own(promises: Promises, client: str) -> OwnAudits:
    own = promises.own.get(client)
    return OwnAudits() if own is None else OwnAudits(weight=own.weight, differing=own.differing.tolist())


def _restored(saved: list[Promised], like: Promises) -> Promises:
    """The promises of a state, restored for the rate, grid of τ, start and error probability of `like`.

    Raises ValueError if they do not match the grid; see Promise.restore.
    """
    promises = Promises(like.rate, like.taus, like.start, like.error)
    for row in saved:
        evidence = Evidence(like.taus)
        for part in row.counts:
            differing, repeats = np.array(part.differing, np.int64), np.array(part.repeats, np.int64)
            evidence.tallies[part.share] = Tally(
                part.texts, 0, 0, differing, np.zeros_like(differing), repeats
            )
        promise = promises.by_left_out[row.left_out] = Promise(like.rate, like.taus, like.start, like.error)
        state = row.model_dump(exclude={"left_out", "texts", "counts", "own"})
        promise.restore(evidence, SavedPromise(**state))
        if row.left_out != ALL:
            own = promises.own[row.left_out] = RecentRates(like.rate, len(like.taus))
            if row.own.differing:
                own.weight, own.differing = row.own.weight, np.array(row.own.differing)
            promises.texts[row.left_out] = row.texts
    return promises


def _counts(state: State) -> Iterator[int]:
    """Every count that grows with further texts."""
    for row in state.counts:
        yield from (row.texts, row.audits, row.served, *row.differing, *row.layers)
    for promise in state.promises:
        yield promise.texts
        for part in promise.counts:
            yield from (part.texts, *part.differing, *part.repeats)


def restore(ledger: Ledger, state: State) -> None:
    """Restore a ledger from a state.

    Raises ValueError if the state belongs to another model, signal, runtime, OOD policy or grid of τ, or if its shares
    or counts leave too little room for new audits.
    """
    manifest, signal = ledger.manifest, ledger.signal
    if state.fingerprint != fingerprint(manifest):
        raise ValueError("it belongs to another model")
    if (state.signal, state.lam) != (signal.name, signal.lam):
        raise ValueError("it belongs to another signal")
    if (state.runtime, state.caution) != (ledger.runtime, ledger.caution):
        raise ValueError("it belongs to another runtime, or another --ood-policy")
    most = max(len(state.counts), *(len(promise.counts) for promise in state.promises), 0)
    if most + NEW_SHARES > MAX_SHARES:
        raise ValueError("it has too many shares")
    if max(_counts(state), default=0) > MAX_COUNT - NEW_COUNT:
        raise ValueError("its counts are too large")
    if state.taus != ledger.taus.tolist():
        raise ValueError("it has other values of τ")
    evidence = Evidence(ledger.taus)
    for row in state.counts:
        differing, layers = np.array(row.differing, np.int64), np.array(row.layers, np.int64)
        evidence.tallies[row.share] = Tally(
            row.texts, row.audits, row.served, differing, layers, np.zeros_like(differing)
        )
    promises = None
    if ledger.promises is not None and state.promises:
        promises = _restored(state.promises, ledger.promises)
    resets = [Reset(row.at, row.reason, row.tau, row.audits) for row in state.resets]
    ledger.restore(evidence, state.since, resets, promises)


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

    def _file(self, ledger: Ledger) -> Path:
        return self.path / f"{ledger.full_name.replace(':', '-')}.json"

    def read(self, ledger: Ledger) -> None:
        """Restore a ledger from its file, if there is one; an unusable file is renamed, with a warning."""
        path = self._file(ledger)
        try:
            restore(ledger, State.model_validate_json(read_regular_file(path, MAX_BYTES)))
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            aside = path.with_suffix(".json.old")
            log.warning("%s cannot be used (%s); audits start from zero; kept as %s", path, what, aside.name)
            with suppress(OSError):
                path.replace(aside)
        else:
            log.info("%s: %d audits from %s", ledger.full_name, ledger.evidence.audits, path)

    def write(self, ledger: Ledger) -> None:
        """Write a ledger's state atomically; raises OSError. Any thread may call this, but only one at a time."""
        path = self._file(ledger)
        new = path.with_suffix(".json.new")
        new.unlink(missing_ok=True)  # O_EXCL refuses any file, such as one that a killed server left
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(state_of(ledger).model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
