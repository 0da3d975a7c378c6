"""The ledgers of a server of one process."""

from collections.abc import Awaitable, Callable
from typing import Any

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.ledger import tau_row
from de3.server.audit.report import Live
from de3.server.engine.served import Served
from de3.server.rules import Choice, Standing
from de3.server.settings import Settings


class LocalBooks(Coordinator):
    """Implements `Books` (audits.py) within the process that serves the models."""

    is_behind = False

    def __init__(
        self,
        settings: Settings,
        in_force: Callable[[Served], Choice],
        publish: Callable[[Manifest, Standing], None],
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """in_force: returns the present choice for requests without options; load may change it. Raises ValueError as
        Coordinator does."""
        super().__init__(settings, publish, change)
        self._in_force = in_force

    def serve(self, served: Served) -> Standing:
        """Start counting for a model, or continue; returns the standing of its ledger."""
        model = served.model
        if self.learners is not None:
            self.learners.serve(Artifact(model.path, model.manifest))
        return self.ledgers.serve(model.manifest, served.rules, model.runtime, served.monitor.tau_factor)

    def forget(self, served: Served) -> None:
        """Stop counting for an unloaded model."""
        self.ledgers.forget(served.model.full_name)

    async def report(self, served: Served, live: Live, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see report.report."""
        return await self.ledgers.report(served.model.full_name, live, self._in_force(served), reader)

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force, and the reason for it."""
        ledger = self.ledgers.get(served.model.full_name)
        if ledger is not None:
            ledger.reset()
        return tau_row(self._in_force(served))
