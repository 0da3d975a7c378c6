"""The ledgers and learners of a server. They are in the process that counts: its only process, or the supervisor."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from statistics import mean
from typing import Any
from weakref import WeakKeyDictionary

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.runtime.choice import Standing
from de3.runtime.errors import RequestError
from de3.runtime.rules import Rules
from de3.runtime.upstream.upstreams import Upstreams
from de3.server.audit.ledger import Ledger, tau_row
from de3.server.audit.ledgers import Ledgers
from de3.server.audit.report import Live, report
from de3.server.audit.tenant import Settled
from de3.server.learn.learners import Learners
from de3.server.learn.record import Record
from de3.server.settings import Settings
from de3.server.shared_run import MAX_WAITING, SharedRun


class Coordinator:
    """Counts the settled texts of all processes, keeps their records, reports results, and runs fits.

    Attributes:
        ledgers: the ledgers of all served models.
        learners: the learners of all served models; None without records.
        upstreams: the upstreams of models.
    """

    is_behind = False  # see AuditStore

    def __init__(
        self,
        settings: Settings,
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
        publish: Callable[[Manifest, Standing], None],
        live_of: Callable[[str], Awaitable[Sequence[Live]]],
        sync: Callable[[], Awaitable[None]],
    ) -> None:
        """change: see Learners. publish: see Ledgers. live_of: returns the state of a model's audits in each process.

        sync: returns once every process has applied what has been published. Raises ValueError if state_dir cannot be
        used, or a package that learning needs is not installed.
        """
        self.ledgers = Ledgers(settings, publish)
        self.learners = Learners(settings, self.ledgers, change) if settings.keeps_records else None
        self.upstreams = Upstreams(settings)
        self._live_of, self._sync = live_of, sync
        self._most = max(MAX_WAITING, settings.processes)
        self._reporting: WeakKeyDictionary[Ledger, dict[str | None, SharedRun[dict[str, Any]]]]
        self._reporting = WeakKeyDictionary()  # reports of a ledger, by reader

    def serve(self, artifact: Artifact, rules: Rules, runtime: str, tau_factor: float) -> Standing:
        """Start counting for a model, or continue; returns its ledger's Standing. See Ledgers.serve."""
        if self.learners is not None:
            self.learners.serve(artifact)
        return self.ledgers.serve(artifact.manifest, rules, runtime, tau_factor)

    def set_current(self, versions: dict[str, int]) -> None:
        """Record the current version of each served name."""
        if self.learners is not None:
            self.learners.set_current(versions)

    def forget(self, manifest: Manifest) -> None:
        """Stop counting for an unloaded model."""
        self.ledgers.forget(manifest.full_name)

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model; see Ledger.count."""
        self.ledgers.count(name, settled)

    def learn(self, name: str, records: Sequence[Record]) -> None:
        """Keep records of the traffic of a model, name:version, for learning."""
        if self.learners is not None:
            for record in records:
                self.learners.add(name, record)

    async def learning(self, name: str, starts: bool) -> dict[str, Any]:
        """The learning report of a model name; see AuditStore.learning."""
        assert self.learners is not None  # checked by Audits
        return self.learners.report(name, starts)

    async def report(self, name: str, level: int, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see AuditStore.report."""
        ledger = self._ledger(name)
        runs = self._reporting.setdefault(ledger, {})
        running = runs.setdefault(reader, SharedRun("report", self._most))
        return await running.result(lambda: self._report(ledger, level, reader))

    async def _report(self, ledger: Ledger, level: int, reader: str | None) -> dict[str, Any]:
        rows = await self._live_of(ledger.manifest.full_name)
        excluded = {
            reason: sum(row.excluded[reason] for row in rows) for reason in (rows[0].excluded if rows else ())
        }
        share = mean(row.share for row in rows) if rows else 0.0
        live = Live(share, sum(row.pending for row in rows), excluded)
        found = await asyncio.to_thread(report, ledger, live, ledger.rules.in_force(level), reader)
        if reader is None and (upstream := self.upstreams.report(ledger.manifest.name)) is not None:
            found["upstream"] = upstream
        return found

    async def reset(self, name: str, level: int) -> dict[str, Any]:
        """Discard the audit results of a model; see AuditStore.reset. Every process then uses the τ that it returns."""
        ledger = self._ledger(name)
        self.ledgers.reset(ledger.manifest.name)
        await self._sync()
        return tau_row(ledger.rules.in_force(level), ledger.manifest)

    def _ledger(self, name: str) -> Ledger:
        ledger = self.ledgers.get(name)
        if ledger is None:
            raise RequestError(f"{name} is no longer served", "name", "unknown_model")
        return ledger

    def start(self) -> None:
        """Start the tasks that save changes and run fits."""
        self.ledgers.start()
        self.upstreams.start()
        if self.learners is not None:
            self.learners.start()

    def stop(self) -> None:
        """Stop learning, save all evidence and records, and close the files; called after the last request."""
        if self.learners is not None:
            self.learners.stop()
        self.upstreams.stop()  # before the ledgers, which unlock the state folder
        self.ledgers.stop()
