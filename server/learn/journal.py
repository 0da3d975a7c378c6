"""Files that a learner keeps across restarts, in the state folder: its journal, records and learned versions."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from de3.model_store.manifest import LEARNED_FROM, MAX_ATTEMPTS, base_of
from de3.model_store.records import MAX_FILE_BYTES, Records
from de3.model_store.records import read as read_records
from de3.model_store.regular_file import read_regular_file, write_private_file
from de3.model_store.store import Artifact, NoModelsError, Store, StoreError

log = logging.getLogger("de3")
MAX_BYTES = 2**20
MAX_RESULTS = 20
MAX_VOID = 1024
MAX_KEPT = 8  # learned versions on disk, in addition to those in use

FitOutcome = Literal["served", "waits", "pinned", "not_faster", "outdated", "failed"]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Result(BaseModel):
    """The outcome of a fit.

    Attributes:
        at: seconds since 1970.
        attempt: number of the fit.
        outcome: served, waits (until newer texts prove more), pinned (another version is pinned), not_faster, outdated
            (the traffic or the models changed meanwhile), or failed.
        version: number of the new version; None unless it is served or kept.
        records, held_out: number of records, and number of those that tested the exits.
        speedup: speed-up in layers at the best τ in hindsight, on the held-out records.
        proved_speedup: speed-up in layers at the τ that these records prove for each tenant.
        served_speedup: speed-up in layers of the version that the fit had to beat.
            The three speed-ups are None if the fit failed.
        seconds: duration of the fit by the clock.
        error: reason for a failure; None otherwise.
    """

    model_config = ConfigDict(extra="forbid")

    at: Number
    attempt: int
    outcome: FitOutcome
    version: int | None = None
    records: int = 0
    held_out: int = 0
    speedup: Number | None = None
    proved_speedup: Number | None = None
    served_speedup: Number | None = None
    seconds: Number = 0.0
    error: str | None = Field(None, max_length=1000)


class Journal(BaseModel):
    """The state of a learner.

    Attributes:
        base: base of the model; see base_of.
        attempts: number of fits so far, the model's own early exits counted as one; the error probability of the
            guarantee is divided between them.
        current: the version that was current when the journal was written.
        latest: the latest learned version that was served.
        origin: the last version that was current and not learned; after a restart, a learned version is served only in
            place of this one.
        first_new: number of the first record after the last change in the traffic.
        void: by tenant, number of the first record after the last change in its traffic.
        results: the results of the latest fits, the latest last.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    base: str = Field(max_length=64)
    attempts: int = Field(0, ge=0, le=MAX_ATTEMPTS)
    current: int | None = None
    latest: int | None = None
    origin: int | None = None
    first_new: int = Field(0, ge=0, le=2**53)
    void: dict[str, int] = Field({}, max_length=MAX_VOID)
    results: list[Result] = Field([], max_length=MAX_RESULTS)


class LearnFolder:
    """The folder `learned` in the state folder.

    It holds the journals, <name>-<base>.json, the records, <name>-<base>.records, and the learned versions,
    versions/<name>/<version>/; <base> is the first 12 hex digits of the base.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "learned"
        self.store = Store(self.path / "versions")
        self._writing = Lock()

    def prepare(self) -> None:
        """Create the folder, and remove unfinished files of a killed server; raises OSError."""
        self.store.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)  # records are user data
        self._remove_drafts()

    def _remove_drafts(self) -> None:
        """Remove drafts that killed fits left in the store."""
        for draft in self.store.path.glob("*/.draft-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def records_path(self, name: str, base: str) -> Path:
        """The file of a model's records."""
        return self.path / f"{name}-{base[:12]}.records"

    def _journal_path(self, name: str, base: str) -> Path:
        return self.path / f"{name}-{base[:12]}.json"

    def journal(self, name: str, base: str) -> Journal:
        """A model's journal; a new one if there is none for this base, or if it is unusable and thus set aside."""
        path, journal = self._journal_path(name, base), Journal.model_validate({"base": base})
        try:
            journal = Journal.model_validate_json(read_regular_file(path, MAX_BYTES))
            if journal.base != base:
                raise ValueError("it belongs to another model")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            journal = Journal.model_validate({"base": base})
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            self._set_aside(path, what)
        # Even if the journal was lost, no attempt number may be used twice.
        journal.attempts = max(journal.attempts, *self._attempts(name, base), 0)
        return journal

    def _attempts(self, name: str, base: str) -> Iterator[int]:
        """Yield the attempt numbers of the learned versions on disk that have this base."""
        for version in self.versions(name):
            with suppress(StoreError):
                learned = self.store.open(f"{name}:{version}").manifest.learned
                if learned is not None and learned.base == base:
                    yield learned.attempt

    def write(self, name: str, journal: Journal, records: Records | None) -> None:
        """Write a journal and records, if given, atomically; raises OSError. Any thread may call it."""
        with self._writing:
            if records is not None:
                records.write(self.records_path(name, journal.base))
            path = self._journal_path(name, journal.base)
            write_private_file(path, journal.model_dump_json(indent=1).encode())

    def records(self, name: str, base: str) -> Records | None:
        """The saved records of a model; None if there are none or if the file is damaged, which is set aside."""
        path = self.records_path(name, base)
        try:
            return read_records(path, MAX_FILE_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.set_aside_records(name, base, str(error))
            return None

    def set_aside_records(self, name: str, base: str, reason: str) -> None:
        """Rename the records file of a model, which cannot be used, and log the reason."""
        self._set_aside(self.records_path(name, base), reason)

    def _set_aside(self, path: Path, reason: str) -> None:
        aside = path.with_name(path.name + ".old")
        log.warning("%s cannot be used (%s); kept as %s", path, reason, aside.name)
        with suppress(OSError):
            path.replace(aside)

    def versions(self, name: str) -> list[int]:
        """The learned versions of a model on disk."""
        try:
            return self.store.versions().get(name, [])
        except (NoModelsError, OSError):
            return []

    def served_before(self, artifact: Artifact, pin: int | None = None) -> Artifact:
        """The learned version that is pinned, or was current when the server ended; the artifact if there is none.

        Also the artifact itself if that version cannot be opened, or was learned for another version of the model.
        """
        journal = self._journal_for(artifact)
        current = None if journal is None else journal.current
        return self._instead_of(artifact, current if pin is None else pin)

    def newest(self, artifact: Artifact) -> Artifact:
        """The latest version that was learned for an artifact and served; the artifact if there is none."""
        journal = self._journal_for(artifact)
        return self._instead_of(artifact, None if journal is None else journal.latest)

    def _journal_for(self, artifact: Artifact) -> Journal | None:
        """The journal of a model whose learned versions are served in place of an artifact; None if there is none."""
        manifest, base = artifact.manifest, base_of(artifact.manifest)
        if not self._journal_path(manifest.name, base).is_file():
            return None
        journal = self.journal(manifest.name, base)
        return journal if journal.origin == manifest.version else None

    def _instead_of(self, artifact: Artifact, version: int | None) -> Artifact:
        """A learned version, to be served in place of an artifact; the artifact if that is not possible."""
        manifest, base, current = artifact.manifest, base_of(artifact.manifest), version
        if current is None or current <= LEARNED_FROM:
            return artifact
        try:
            found = self.store.open(f"{manifest.name}:{current}")
        except StoreError as error:
            log.error("the learned version %d is not served: %s", current, error)
            return artifact
        if base_of(found.manifest) == base:
            return found
        log.warning("the learned version %d is not served, as the model's weights have changed", current)
        return artifact

    def remove_old(self, name: str, used: set[int]) -> None:
        """Remove drafts, and the learned versions of a model, except the MAX_KEPT newest and those in `used`.

        No fit may be running.
        """
        self._remove_drafts()
        for version in self.versions(name)[:-MAX_KEPT]:
            if version not in used:
                shutil.rmtree(self.store.path / name / str(version), ignore_errors=True)
