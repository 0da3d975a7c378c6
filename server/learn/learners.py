"""The learners of a server, and the task that runs their fits, one at a time."""

import asyncio
import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

from de3.extras import install
from de3.model_store.manifest import LEARNED_FROM, Manifest, base_of
from de3.model_store.store import Artifact, Store, StoreError
from de3.runtime.background import keep_running, report, run_once
from de3.runtime.errors import RequestError
from de3.runtime.fit import HeldOut, Job
from de3.runtime.rules import Rules
from de3.server.learn.fitting import FitError, memory_limit, run_fit
from de3.server.learn.journal import LearnFolder, Result
from de3.server.learn.learner import MIN_RECORDS, Changes, InService, Learner, Waiting, result_of, sentence
from de3.server.learn.record import Record
from de3.server.settings import Settings

log = logging.getLogger("de3")
CHECK_S = 0.5
# Minimum speed-up of a version that is to be served, relative to the served one's.
MIN_GAIN = 1.02
ADDED_AT_ONCE = 64  # held-back records added in one iteration of the event loop: 1 to 8 ms
RETRIES = 30  # attempts to load a version while an admin changes the models
_FOLDERS = re.compile(r"(?:/[^/\s:'\"]+)+/")


class Ledgers(Protocol):
    """The part of the server's audit ledgers that learning needs."""

    def base(self, name: str) -> str | None:
        """The base of a served model, by name:version; None if it is not served."""

    def in_service(self, name: str, version: int) -> InService:
        """The performance of a served version; a speed-up of 1 if it is not served. Any thread may call this."""

    def traffic_changes(self, name: str, version: int) -> Changes:
        """The changes in the traffic that the audits of a version have found; none if it is not served."""

    def versions(self, name: str) -> set[int]:
        """The served versions of a model name."""

    def start_speedup(self, manifest: Manifest, rows: Sequence[HeldOut], current: str) -> float:
        """The speed-up over the traffic with which a version would start, given held-out texts.

        current: name:version of the served version, whose tenants and traffic are assumed.
        """

    def prepare(self, name: str, rows: Sequence[HeldOut], current: str) -> None:
        """Set the held-out texts of a learned version, name:version, that is about to be served; see start_speedup."""


class Learners:
    """A learner for each served model name, for the weights of its current version."""

    def __init__(
        self,
        settings: Settings,
        ledgers: Ledgers,
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """change: changes the served models, given the fields of a manager.Change.

        Raises ValueError if the state folder is not set or cannot be written, or a package that fits need is not
        installed.
        """
        if settings.state_dir is None:
            raise ValueError("learn: requires state_dir, a folder for the learned versions")
        if settings.learn:
            check_can_fit()
        self._settings, self._ledgers, self._change = settings, ledgers, change
        self.starts_fits = settings.learn  # False: it only keeps records
        self._folder = LearnFolder(settings.state_dir)
        self._store = Store(settings.store, settings.state_dir)  # holds the pins
        try:
            self._folder.prepare()
        except OSError as error:
            raise ValueError(f"state_dir: {self._folder.path} cannot be written: {error.strerror}") from None
        self._served: dict[str, Artifact] = {}  # by name:version
        self._by_name: dict[str, Learner] = {}
        self._gone: list[Learner] = []  # learners that are no longer used, and not yet saved
        self._current: dict[str, int] = {}
        self._checking: asyncio.Task[None] | None = None
        self._fitting: asyncio.Task[None] | None = None
        self.fits: dict[tuple[str, str], int] = {}  # number of fits, by model and outcome

    def serve(self, artifact: Artifact) -> None:
        """Record that a version is served, in any role."""
        self._served[artifact.full_name] = artifact

    def set_current(self, versions: dict[str, int]) -> None:
        """Record the current version of each served name.

        A name whose weights have changed gets a new learner; a name that is no longer served loses its learner.
        """
        self._current = dict(versions)
        for name in [name for name in self._by_name if name not in versions]:
            self._gone.append(self._by_name.pop(name))
        for name, version in versions.items():
            artifact, learner = self._served.get(f"{name}:{version}"), self._by_name.get(name)
            if artifact is None:
                continue
            if learner is None or learner.base != base_of(artifact.manifest):
                if learner is not None:
                    self._gone.append(learner)
                learner = self._by_name[name] = Learner(artifact, self._folder, self._settings)
            learner.serve(artifact)

    def add(self, full_name: str, record: Record) -> None:
        """Keep a record of the traffic of a served model, name:version, if it has the learner's weights."""
        learner = self._by_name.get(full_name.partition(":")[0])
        if learner is not None and self._ledgers.base(full_name) == learner.base:
            learner.add(record)

    @property
    def all(self) -> list[Learner]:
        """All learners; safe to call from another thread."""
        return list(self._by_name.values())

    def of(self, name: str) -> Learner:
        """The learner of a name; raises RequestError if the name is not served."""
        learner = self._by_name.get(name)
        if learner is None:
            raise RequestError(f"{name} is not served", "name", "unknown_model")
        return learner

    def report(self, name: str, starts: bool = False) -> dict[str, Any]:
        """The state of the learner of a name. starts: first request a fit, which starts as soon as possible.

        Raises RequestError if the name is not served, or if there are too few records for the fit.
        """
        learner = self.of(name)
        if starts and learner.count < MIN_RECORDS:
            raise RequestError(
                f"{name}: {learner.count} records are too few to fit exits; at least {MIN_RECORDS} are needed",
                "name",
                "conflict",
            )
        learner.is_asked |= starts
        return learner.report()

    def start(self) -> None:
        """Start the task that runs the fits."""
        self._checking = keep_running("learning", self._run)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            await self._check()

    async def _check(self) -> None:
        self._served = {name: one for name, one in self._served.items() if self._ledgers.base(name)}
        while self._gone:
            gone = self._gone.pop()
            await asyncio.to_thread(self._save, gone, partial(gone.save, True))
        for learner in self.all:
            if not learner.is_restored:
                learner.restore(await asyncio.to_thread(self._folder.records, learner.name, learner.base))
            learner.observe(self._changes(learner))
            if learner.phase != "recording":  # a process reads the records
                await asyncio.to_thread(self._save, learner, learner.save_journal)
            elif learner.needs_saving:
                await self._save_aside(learner)
        if not self.starts_fits or (self._fitting is not None and not self._fitting.done()):
            return
        due = next((one for one in self.all if one.is_due), None)
        tested = next((one for one in self.all if one.is_test_due), None)
        # A test comes first, because a fit replaces the waiting version.
        if tested is not None and tested.waiting is not None:
            self._fitting = run_once("fit", self._test(tested, tested.waiting))
        elif due is not None:
            self._fitting = run_once("fit", self._fit(due))

    def _changes(self, learner: Learner) -> Changes:
        """The changes that the current version has found."""
        return self._ledgers.traffic_changes(learner.name, self._current.get(learner.name, 0))

    def _rival(self, learner: Learner) -> InService:
        """The version that a fit has to beat.

        This is the latest learned version if it is served and faster than the current version, else the current one.
        """
        current = self._ledgers.in_service(learner.name, self._current.get(learner.name, 0))
        latest = learner.journal.latest
        if latest is None or latest not in self._ledgers.versions(learner.name):
            return current
        canary = self._ledgers.in_service(learner.name, latest)
        return canary if canary.speedup > current.speedup else current

    async def _fit(self, learner: Learner) -> None:
        attempt = learner.begin()
        log.info("%s: fit %d begins, on %d records", learner.name, attempt, learner.count)
        await self._conclude(learner, attempt, self._try(learner, attempt))

    async def _test(self, learner: Learner, waiting: Waiting) -> None:
        learner.phase = "testing"
        await self._conclude(learner, waiting.attempt, self._try_again(learner, waiting))

    async def _conclude(self, learner: Learner, attempt: int, trial: Coroutine[Any, Any, Result]) -> None:
        """Wait for a fit or a test, and record its result."""
        try:
            result = await trial
        except (FitError, RequestError, StoreError, OSError) as error:
            log.warning("%s: fit %d failed: %s", learner.name, attempt, error)
            message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            result = _failure(attempt, message)
        except Exception as error:
            report("fit", error)
            result = _failure(attempt, "internal error; the server's log has the details")
        except asyncio.CancelledError:
            learner.phase = "recording"
            raise
        if learner.phase == "fitting" or result.outcome != "waits":  # else it is counted already
            self.fits[learner.name, result.outcome] = self.fits.get((learner.name, result.outcome), 0) + 1
        learner.end(result)
        if result.outcome != "failed":
            log.info("%s: %s", learner.name, sentence(result))
        kept = {self._current.get(learner.name, 0), learner.journal.latest or 0}
        used = self._ledgers.versions(learner.name) | kept
        if learner.waiting is not None:
            used.add(learner.waiting.artifact.manifest.version)
        await asyncio.to_thread(self._folder.remove_old, learner.name, used)

    async def _try(self, learner: Learner, attempt: int) -> Result:
        current, first_new = self._current.get(learner.name, 0), learner.journal.first_new
        # Other weights of this name may have learned versions, too.
        version = max([LEARNED_FROM, *self._folder.versions(learner.name)]) + 1
        rival = await asyncio.to_thread(self._rival, learner)
        after, count = int(learner.reservoir.texts), learner.count
        # Saved before the fit, so that no attempt number is used twice after a crash.
        await self._save_aside(learner, must=True)
        found = await run_fit(self._job(learner, rival, attempt, version))
        if found.path is None:
            return result_of(attempt, found)
        artifact = await asyncio.to_thread(self._folder.store.open, f"{learner.name}:{version}")
        waiting = Waiting(artifact, current, found, attempt, found.evidence, after, count)
        return await self._serve_if_faster(learner, waiting, first_new)

    async def _try_again(self, learner: Learner, waiting: Waiting) -> Result:
        """Test a waiting version on newer records as well."""
        first_new = learner.journal.first_new
        after, manifest = int(learner.reservoir.texts), waiting.artifact.manifest
        waiting.count = learner.count  # even if the test fails, so that it is not repeated at once
        await self._save_aside(learner, must=True)
        rival = await asyncio.to_thread(self._rival, learner)
        job = self._job(learner, rival, waiting.attempt, manifest.version)
        test = job.model_copy(update={"base": waiting.artifact.path.absolute(), "after": waiting.after})
        found = await run_fit(test)
        newer = [
            row
            for row in found.evidence
            if row.key is not None or any(map(any, filter(None, row.audited.failures)))
        ]
        waiting.rows, waiting.after = [*waiting.rows, *newer], after
        return await self._serve_if_faster(learner, waiting, first_new)

    async def _serve_if_faster(self, learner: Learner, waiting: Waiting, first_new: int) -> Result:
        """Serve a version if it starts out faster than the served one; otherwise keep it, to be tested on newer texts.

        first_new: that of the journal before the fit or test.
        """
        rival = await asyncio.to_thread(self._rival, learner)
        learner.observe(self._changes(learner))
        current = f"{learner.name}:{self._current.get(learner.name, 0)}"
        is_same = (
            self._by_name.get(learner.name) is learner and self._current[learner.name] == waiting.current
        )
        if not is_same or learner.journal.first_new != first_new:
            learner.waiting = None
            await asyncio.to_thread(shutil.rmtree, waiting.artifact.path, ignore_errors=True)
            return result_of(waiting.attempt, waiting.found, "outdated")
        manifest = waiting.artifact.manifest
        waiting.rows = [row for row in waiting.rows if learner.may_prove(row)]
        speedup = await asyncio.to_thread(self._ledgers.start_speedup, manifest, waiting.rows, current)
        measured = {"proved_speedup": round(speedup, 3), "served_speedup": round(rival.speedup, 3)}
        waiting.found = waiting.found.model_copy(update={"held_out": len(waiting.rows), **measured})
        if speedup < MIN_GAIN * rival.speedup:
            learner.wait_for_tests(waiting)
            if learner.waiting is None:
                return result_of(waiting.attempt, waiting.found)
            return result_of(waiting.attempt, waiting.found, "waits", manifest.version)
        if await asyncio.to_thread(self._store.pin, learner.name) is not None:
            learner.wait_for_tests(waiting)
            return result_of(waiting.attempt, waiting.found, "pinned", manifest.version)
        learner.waiting = None
        learner.observe(self._changes(learner))
        rows = [row for row in waiting.rows if learner.may_prove(row)]
        self._ledgers.prepare(waiting.artifact.full_name, rows, current)
        await self._serve(learner, manifest.version)
        learner.journal.latest = manifest.version
        return result_of(waiting.attempt, waiting.found, "served", manifest.version)

    def _job(self, learner: Learner, rival: InService, attempt: int, version: int) -> Job:
        records = self._folder.records_path(learner.name, learner.base)
        served = self._served.get(f"{learner.name}:{rival.version}", learner.artifact)
        return Job(
            base=served.path.absolute(),
            records=records.absolute(),
            store=self._folder.store.path.absolute(),
            version=version,
            attempt=attempt,
            limits=Rules(served.manifest, self._settings).limits,
            first_new=learner.journal.first_new,
            by_client=self._settings.has_keys,
            speedup=rival.speedup,
            memory=memory_limit(served.size(), records.stat().st_size),
        )

    async def _serve(self, learner: Learner, version: int) -> None:
        """Load a learned version in every process; raises RequestError if it cannot be loaded."""
        change = {"what": "load", "name": learner.name, "version": version, "role": "current", "share": 0.0}
        for last in range(RETRIES):
            try:
                await self._change(change)
                return
            except RequestError as error:
                if error.cause != "conflict" or last == RETRIES - 1:
                    raise
                await asyncio.sleep(1.0)

    async def _save_aside(self, learner: Learner, must: bool = False) -> None:
        """Save a learner in another thread, holding back new records. must: save all records, or raise FitError."""
        learner.hold()
        try:
            await asyncio.to_thread(self._save, learner, partial(learner.save, must), must)
        finally:
            while learner.resume(ADDED_AT_ONCE):
                await asyncio.sleep(0)

    def _save(self, learner: Learner, save: Callable[[], None], must: bool = False) -> None:
        """Save a learner or its journal. If that fails, the error is logged; with `must`, raises FitError."""
        try:
            save()
        except OSError as error:
            if must:
                raise FitError(f"state_dir: cannot save the records: {error.strerror}") from None
            log.error("state_dir: cannot save the learned state of %s: %s", learner.name, error)

    def stop(self) -> None:
        """End a running fit, and save the records; called once no more texts are counted, not on the event loop."""
        for task in (self._checking, self._fitting):
            if task is not None and task.get_loop().is_running():
                task.get_loop().call_soon_threadsafe(task.cancel)
        for learner in [*self._gone, *self.all]:
            self._save(learner, partial(learner.save, True))  # waits for a thread that is saving it


def _failure(attempt: int, message: str) -> Result:
    """The result of a fit that failed. Clients can read the message, so folders are removed from it."""
    return Result(at=time.time(), attempt=attempt, outcome="failed", error=_FOLDERS.sub("", message)[:1000])


def check_can_fit() -> None:
    """Raise ValueError if the packages that a fit needs are not installed."""
    from importlib.util import find_spec

    if find_spec("scipy") is None:
        raise ValueError(f"learn: fits need SciPy, which is not installed: {install('fit')}")
