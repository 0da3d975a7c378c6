"""What a learner keeps across restarts, in the state folder: its journal, its records and the learned versions."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from de3.model_store.manifest import MAX_ATTEMPTS, base_of
from de3.model_store.records import MAX_FILE_BYTES, Records
from de3.model_store.records import read as read_records
from de3.model_store.regular_file import read_regular_file
from de3.model_store.store import Artifact, NoModelsError, Store, StoreError

log = logging.getLogger("de3")
MAX_BYTES = 2**20
MAX_RESULTS = 20
MAX_KEPT = 8  # learned versions on disk, besides those in use
LEARNED_FROM = (
    1_000_000  # numbers of learned versions are above it, so that no version of a store has the same
)

Outcome = Literal["served", "not_faster", "outdated", "failed"]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Result(BaseModel):
    """The outcome of a fit.

    Attributes:
        at: seconds since 1970.
        attempt: its number.
        outcome: served, not_faster, outdated (the traffic or the models changed meanwhile), or failed.
        version: of the new version; None without one.
        records, held_out: number of records, and of those that tested the exits.
        speedup: by the best τ in hindsight on the held-out records; proved_speedup: by the τ that they prove;
            served_speedup: by the best τ in hindsight, of the version that was served, by its audits.
        seconds: duration.
        error: reason of a failure.
    """

    model_config = ConfigDict(extra="forbid")

    at: Number
    attempt: int
    outcome: Outcome
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
        base: of the model; see base_of.
        attempts: number of fits so far. It is kept, as the error probability of a guarantee is divided between them.
        current: the version that was current.
        latest: the latest learned version that was served.
        origin: the version that the server was started with, whose exits were learned.
        first_new: number of the first record after the last change of the traffic.
        results: the latest fits.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    base: str = Field(max_length=64)
    attempts: int = Field(0, ge=0, le=MAX_ATTEMPTS)
    current: int | None = None
    latest: int | None = None
    origin: int | None = None
    first_new: int = Field(0, ge=0, le=2**53)
    results: list[Result] = Field([], max_length=MAX_RESULTS)


class LearnFolder:
    """The folder `learned` in the state folder.

    It has <name>-<base>.json and <name>-<base>.records, with the first digits of the base's hash, and
    versions/<name>/<version>/.
    """

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "learned"
        self.store = Store(self.path / "versions")
        self._writing = Lock()

    def prepare(self) -> None:
        """Create the folder; raises OSError."""
        self.store.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)  # records are user data

    def records_path(self, name: str, base: str) -> Path:
        """The file of a model's records."""
        return self.path / f"{name}-{base[:12]}.records"

    def _journal_path(self, name: str, base: str) -> Path:
        return self.path / f"{name}-{base[:12]}.json"

    def journal(self, name: str, base: str) -> Journal:
        """A model's journal; a new one if there is none of this base."""
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
        # If the journal was lost: numbers of attempts must not be used twice.
        journal.attempts = max(journal.attempts, *self._attempts(name, base), 0)
        return journal

    def _attempts(self, name: str, base: str) -> Iterator[int]:
        """The attempts of which there are versions."""
        yield 0
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
            new = path.with_suffix(".json.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(journal.model_dump_json(indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)

    def records(self, name: str, base: str) -> Records | None:
        """The saved records of a model; None without any. A damaged file is set aside."""
        path = self.records_path(name, base)
        try:
            return read_records(path, MAX_FILE_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.set_aside_records(name, base, str(error))
            return None

    def set_aside_records(self, name: str, base: str, reason: str) -> None:
        """Rename the records of a model, which cannot be used."""
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

    def served_before(self, artifact: Artifact) -> Artifact:
        """The learned version that was current when the server ended, if it was learned for this version of this
        model; else the model."""
        manifest, base = artifact.manifest, base_of(artifact.manifest)
        if not self._journal_path(manifest.name, base).is_file():
            return artifact
        journal = self.journal(manifest.name, base)
        if journal.current is None or journal.current <= LEARNED_FROM or journal.origin != manifest.version:
            return artifact
        try:
            found = self.store.open(f"{manifest.name}:{journal.current}")
        except StoreError as error:
            log.error("the learned version %d is not served: %s", journal.current, error)
            return artifact
        return found if base_of(found.manifest) == base else artifact

    def remove_old(self, name: str, used: set[int]) -> None:
        """Remove all versions of a model but the newest, and those in use."""
        for version in self.versions(name)[:-MAX_KEPT]:
            if version not in used:
                shutil.rmtree(self.store.path / name / str(version), ignore_errors=True)
