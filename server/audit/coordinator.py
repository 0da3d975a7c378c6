"""The ledgers and learners of a server, in the one process that counts: the server's own, or the supervisor."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from de3.model_store.manifest import Manifest
from de3.server.audit.ledgers import Ledgers
from de3.server.audit.tenant import Settled
from de3.server.learn.learners import Learners
from de3.server.learn.record import Record
from de3.server.rules import Standing
from de3.server.settings import Settings


class Coordinator:
    """Counts settled texts, keeps records, and has the fits run.

    Attributes:
        ledgers: the ledgers of all served models.
        learners: the learners of all served models; None without records.
    """

    def __init__(
        self,
        settings: Settings,
        publish: Callable[[Manifest, Standing], None],
        change: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
    ) -> None:
        """publish: see Ledgers. change: see Learners.

        Raises ValueError if state_dir cannot be used, or a package that learning needs is not installed.
        """
        self.ledgers = Ledgers(settings, publish)
        self.learners = Learners(settings, self.ledgers, change) if settings.keeps_records else None

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model; see Ledger.count."""
        self.ledgers.count(name, settled)

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
