"""The ledgers of a server of one process."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.server.audit.ledger import tau_row
from de3.server.audit.ledgers import Ledgers
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.engine.served import Served
from de3.server.learn.learners import Learners
from de3.server.learn.record import Record
from de3.server.rules import Choice, Standing
from de3.server.settings import Settings


class LocalBooks:
    """Implements `Books` (audits.py) within the process that serves the models.

    Attributes:
        ledgers: the ledgers of all served models.
        learners: the learners of all served models; None without records.
    """

    is_behind = False

    def __init__(
        self,
        settings: Settings,
        in_force: Callable[[Served], Choice],
        publish: Callable[[Manifest, Standing], None],
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """in_force: returns the present choice for requests without options; load may change it. publish: see Ledgers.
        change: see Learners.

        Raises ValueError if state_dir cannot be used, or a package that learning needs is not installed.
        """
        self._in_force = in_force
        self.ledgers = Ledgers(settings, publish)
        self.learners = Learners(settings, self.ledgers, change) if settings.keeps_records else None

    def serve(self, served: Served) -> Standing:
        """Start counting for a model, or continue; returns the standing of its ledger."""
        model = served.model
        if self.learners is not None:
            self.learners.serve(Artifact(model.path, model.manifest))
        return self.ledgers.serve(model.manifest, served.rules, model.runtime, served.monitor.tau_factor)

    def forget(self, served: Served) -> None:
        """Stop counting for an unloaded model."""
        self.ledgers.forget(served.model.full_name)

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model; see Ledger.count."""
        self.ledgers.count(name, settled)

    async def report(self, served: Served, live: Live, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see report.report."""
        return await self.ledgers.report(served.model.full_name, live, self._in_force(served), reader)

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force, and the reason for it."""
        ledger = self.ledgers.get(served.model.full_name)
        if ledger is not None:
            ledger.reset()
        return tau_row(self._in_force(served))

    def learn(self, name: str, record: Record) -> None:
        """Keep a record of the traffic of a model, name:version, for learning."""
        if self.learners is not None:
            self.learners.add(name, record)

    async def learning(self, name: str, starts: bool) -> dict[str, Any]:
        """The learning report of a model name. starts: also start a fit, as soon as possible.

        Raises RequestError if the name is not served, or if there are too few records for the fit.
        """
        assert self.learners is not None  # Audits has checked it
        return self.learners.ask(name) if starts else self.learners.report(name)

    def start(self) -> None:
        """Start the tasks that save changes and run fits."""
        self.ledgers.start()
        if self.learners is not None:
            self.learners.start()

    def stop(self) -> None:
        """Stop learning, save all evidence and records, and close the files; called after the last request."""
        if self.learners is not None:
            self.learners.stop()
        self.ledgers.stop()
