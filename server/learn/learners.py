"""The learners of a server, and the task that runs their fits, one at a time."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from de3.model_store.manifest import base_of
from de3.model_store.store import Artifact, NoModelsError, Store, StoreError
from de3.server.errors import RequestError
from de3.server.failures import FailureLog
from de3.server.learn.fitting import FitError, memory_limit, run_fit
from de3.server.learn.journal import LearnFolder, Result
from de3.server.learn.learner import LEAST_RECORDS, InService, Learner, result_of, sentence
from de3.server.learn.record import HeldOut, Record
from de3.server.settings import Settings

log = logging.getLogger("de3")
failures = FailureLog(log)
CHECK_S = 0.5
RETRIES = 30  # of loading a version while an admin changes the models


class Ledgers(Protocol):
    """The server's ledgers of audits, as far as learning needs them."""

    def base(self, name: str) -> str | None:
        """The base of a served model, by name:version; None if it is not served."""

    def in_service(self, name: str, version: int) -> InService:
        """What a version that is served achieves."""

    def versions(self, name: str) -> set[int]:
        """The versions of a name that are served."""

    def prepare(self, name: str, rows: Sequence[HeldOut]) -> None:
        """Give the evidence with which a learned version, name:version, starts, which is about to be served."""


class Learners:
    """A learner for each served model name."""

    def __init__(
        self,
        settings: Settings,
        ledgers: Ledgers,
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """change: changes the served models, given the fields of a manager.Change. Raises ValueError if the state
        folder cannot be written."""
        assert settings.state_dir is not None
        self._settings, self._ledgers, self._change = settings, ledgers, change
        self._folder = LearnFolder(settings.state_dir)
        try:
            self._folder.prepare()
        except OSError as error:
            raise ValueError(f"state_dir: {self._folder.path} cannot be written: {error.strerror}") from None
        self._by_name: dict[str, Learner] = {}
        self._current: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None
        self.fits: dict[tuple[str, str], int] = {}  # by model and outcome

    def serve(self, artifact: Artifact) -> None:
        """Learn for a model that is served; a version of one that is known continues."""
        name = artifact.manifest.name
        known = self._by_name.get(name)
        if known is not None and known.base == base_of(artifact.manifest):
            known.artifact = artifact
            return
        self._by_name[name] = Learner(artifact, self._folder, self._settings)

    def note_current(self, versions: dict[str, int]) -> None:
        """Note the current version of each served name."""
        self._current = versions
        for name in [name for name in self._by_name if name not in versions]:
            self._save(self._by_name.pop(name))
        for name, learner in self._by_name.items():
            if learner.journal.current != versions[name]:
                learner.journal.current = versions[name]
                self._write(learner)

    def _write(self, learner: Learner) -> None:
        try:
            self._folder.write_journal(learner.name, learner.journal)
        except OSError as error:
            log.error("state_dir: cannot be written: %s", error)

    def add(self, full_name: str, record: Record) -> None:
        """Keep a record of a served model."""
        learner = self._by_name.get(full_name.partition(":")[0])
        if learner is not None and self._ledgers.base(full_name) == learner.base:
            learner.add(record)

    @property
    def all(self) -> list[Learner]:
        """All learners; safe to call from another thread."""
        return list(self._by_name.values())

    def of(self, name: str) -> Learner:
        """The learner of a name; raises RequestError."""
        learner = self._by_name.get(name)
        if learner is None:
            raise RequestError(f"{name} is not served", "name", "unknown_model")
        return learner

    def report(self, name: str) -> dict[str, Any]:
        """The state of a learner; raises RequestError."""
        return self.of(name).report()

    def ask(self, name: str) -> dict[str, Any]:
        """Start a fit as soon as possible; raises RequestError if there are too few records."""
        learner = self.of(name)
        if len(learner.reservoir) < LEAST_RECORDS:
            raise RequestError(
                f"{name}: {len(learner.reservoir)} records are too few to fit exits, at least {LEAST_RECORDS} are "
                "needed",
                "name",
                "conflict",
            )
        learner.is_asked = True
        return learner.report()

    def start(self) -> None:
        """Start the task that runs the fits."""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            for learner in self.all:
                try:
                    await self._check(learner)
                except Exception:  # no error must end the task
                    failures.exception("%s: learning failed", learner.name)

    async def _check(self, learner: Learner) -> None:
        version = self._current.get(learner.name, learner.artifact.manifest.version)
        served = self._ledgers.in_service(learner.name, version)
        learner.observe(served)
        if learner.is_due and len(learner.reservoir) >= LEAST_RECORDS:
            await self._fit(learner, served)
        elif learner.needs_saving:
            await self._save_aside(learner)

    async def _fit(self, learner: Learner, served: InService) -> None:
        attempt = learner.begin()
        log.info("%s: fit %d begins, on %d records", learner.name, attempt, len(learner.reservoir))
        try:
            # First, so that no number of an attempt is used twice.
            await self._save_aside(learner, must=True)
            version = self._next_version(learner.name)
            found = await run_fit(self._job(learner, served, attempt, version))
            if found["path"] is not None:
                await self._serve(learner, version, found["evidence"])
            result = result_of(attempt, found, None if found["path"] is None else version)
        except (FitError, RequestError, StoreError, OSError) as error:
            result = Result(at=time.time(), attempt=attempt, outcome="failed", error=str(error)[:1000])
        except BaseException:
            learner.phase = "recording"
            raise
        learner.end(result)
        self.fits[learner.name, result.outcome] = self.fits.get((learner.name, result.outcome), 0) + 1
        log.log(
            logging.WARNING if result.outcome == "failed" else logging.INFO,
            *("%s: %s", learner.name, sentence(result)),
        )
        await asyncio.to_thread(self._write, learner)
        self._folder.remove_old(learner.name, self._in_use(learner.name))

    def _job(self, learner: Learner, served: InService, attempt: int, version: int) -> dict[str, Any]:
        records = self._folder.records_path(learner.name)
        return {
            "base": str(learner.artifact.path.absolute()),
            "records": str(records.absolute()),
            "store": str(self._folder.store.path.absolute()),
            "version": version,
            "attempt": attempt,
            "rate": self._settings.guarantee,
            "first_new": learner.journal.first_new,
            "speedup": served.speedup,
            "memory": memory_limit(learner.artifact.size(), records.stat().st_size),
        }

    def _next_version(self, name: str) -> int:
        """The number of a new version, which no version in the store has."""
        versions = [*self._folder.versions(name), self._current.get(name, 0)]
        with suppress(NoModelsError, OSError):
            versions += Store(self._settings.store).versions().get(name, [])
        return 1 + max(versions, default=0)

    def _in_use(self, name: str) -> set[int]:
        return self._ledgers.versions(name) | {self._current.get(name, 0)}

    async def _serve(self, learner: Learner, version: int, evidence: list[dict[str, Any]]) -> None:
        """Load a learned version in every process; raises RequestError if that is not possible."""
        self._ledgers.prepare(f"{learner.name}:{version}", [HeldOut(**row) for row in evidence])
        share = self._settings.learn_canary
        change = {"what": "load", "name": learner.name, "version": version}
        change |= {"role": "canary", "share": share} if share else {"role": "current", "share": 0.0}
        for last in range(RETRIES):
            try:
                await self._change(change)
                return
            except RequestError as error:
                if error.cause != "conflict" or last == RETRIES - 1:
                    raise
                await asyncio.sleep(1.0)

    async def _save_aside(self, learner: Learner, must: bool = False) -> None:
        """Write the records and the journal in a thread; new records wait meanwhile."""
        learner.hold()
        try:
            await asyncio.to_thread(self._save, learner, must)
        finally:
            learner.resume()

    def _save(self, learner: Learner, must: bool = False) -> None:
        """Write the records and the journal. must: raise OSError if they cannot be."""
        try:
            learner.save()
        except OSError as error:
            if must:
                raise
            log.error("state_dir: the records of %s cannot be written: %s", learner.name, error)

    def stop(self) -> None:
        """End a running fit, and save the records; called once no more texts are counted."""
        if self._task is not None:
            loop = self._task.get_loop()
            if loop.is_running():
                loop.call_soon_threadsafe(self._task.cancel)
        for learner in self.all:
            self._save(learner)


def check_can_fit() -> None:
    """Raise ValueError if the packages that a fit needs are not installed."""
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise ValueError("learn: fits need SciPy, which is not installed: pip install 'de3[fit]'")


def served_before(artifacts: list[Artifact], state_dir: Path) -> list[Artifact]:
    """The artifacts, each replaced by its learned version that was current when the server ended."""
    folder = LearnFolder(state_dir)
    return [folder.served_before(artifact) for artifact in artifacts]
