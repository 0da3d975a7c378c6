"""The audits of a server of several processes: one ledger for each model counts the texts that all processes settle."""

from collections.abc import Awaitable, Callable
from statistics import mean
from typing import Any
from weakref import WeakKeyDictionary

from de3.model_store.manifest import Manifest, fingerprint
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.ledger import Ledger, tau_row
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.errors import RequestError
from de3.server.processes.group import Group, ask_all
from de3.server.processes.worker import record_of
from de3.server.rules import Standing
from de3.server.settings import Settings
from de3.server.shared_run import SharedRun


class SharedBooks(Coordinator):
    """The ledgers and learners that all processes share."""

    def __init__(
        self,
        settings: Settings,
        group: Group,
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """Raises ValueError as Coordinator does."""
        self._group = group
        super().__init__(settings, self._publish, change)
        self._reporting: WeakKeyDictionary[Ledger, dict[str | None, SharedRun[dict[str, Any]]]]
        self._reporting = WeakKeyDictionary()  # by reader

    def _publish(self, manifest: Manifest, standing: Standing) -> None:
        key = fingerprint(manifest)
        for process in self._group.all:
            process.channel.tell("standing", key, *standing)

    def count_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Count texts of a model, name:version, that a process has settled. rows: `Settled` as JSON objects."""
        self.count(name, [Settled(**row) for row in rows])

    def learn_rows(self, rows: list[list[Any]]) -> None:
        """Keep records of live traffic that a process has sent. rows: see record_row()."""
        for row in rows:
            self.learn(*record_of(row))

    def _ledger(self, name: str) -> Ledger:
        ledger = self.ledgers.get(name)
        if ledger is None:
            raise RequestError(f"{name} is no longer served", "name", "unknown_model")
        return ledger

    async def report(self, name: str, level: int, reader: str | None) -> dict[str, Any]:
        """The audit results of a model, name:version, at a load level; see report.report.

        Raises RequestError if the model is not served, or if too many requests wait for its report.
        """
        ledger = self._ledger(name)
        runs = self._reporting.setdefault(ledger, {})
        running = runs.setdefault(reader, SharedRun("report", self._group.size))
        return await running.result(lambda: self._report(ledger, level, reader))

    async def _report(self, ledger: Ledger, level: int, reader: str | None) -> dict[str, Any]:
        name = ledger.full_name
        rows = [Live(*row) for row in await ask_all(self._group.ready, "live", name) if row]
        excluded = {
            reason: sum(row.excluded[reason] for row in rows) for reason in (rows[0].excluded if rows else ())
        }
        share = mean(row.share for row in rows) if rows else 0.0
        live = Live(share, sum(row.pending for row in rows), excluded)
        return await self.ledgers.report(name, live, ledger.rules.in_force(level), reader)

    async def reset(self, name: str, level: int) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force at a load level, and the reason.

        When it returns, every process uses this τ. Raises RequestError for a model that is no longer served.
        """
        ledger = self._ledger(name)
        ledger.reset()
        await ask_all(self._group.all, "sync")  # a process answers after it has the new standing
        return tau_row(ledger.rules.in_force(level))
