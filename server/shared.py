"""State that the processes of a server share, and its implementation for a server of one process."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from prometheus_client import generate_latest

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.server.audit.audits import Books
from de3.server.audit.local_books import LocalBooks
from de3.server.engine.served import Served
from de3.server.manager import Change, Manager
from de3.server.metrics import Metrics
from de3.server.rules import Choice, Standing
from de3.server.settings import Settings


class Leases(Protocol):
    """Rate limits that the supervisor keeps for all processes."""

    async def lease(self, owner: str, texts: int) -> int:
        """Take at least this many texts from an owner's limit; returns the number taken.

        Raises RequestError if the limit does not permit that many.
        """

    def charge(self, owner: str, texts: int) -> None:
        """Count texts that already ran, even beyond the owner's limit."""


class Shared(Protocol):
    """The server as a whole, as one of its processes sees it."""

    @property
    def books(self) -> Books:
        """The ledgers of audits."""

    @property
    def leases(self) -> Leases | None:
        """Rate limits of all processes; None: this process keeps them."""

    @property
    def is_ready(self) -> bool:
        """True once every process is ready."""

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; see Manager.begin."""

    async def scrape(self) -> bytes:
        """The metrics of all processes, in the text format of Prometheus."""

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models of all processes, or of none; raises RequestError."""

    def start(self) -> None:
        """Hook that is called once the models are loaded."""

    def stop(self) -> None:
        """Hook that is called once no more requests are answered."""


class OneProcess:
    """Implements `Shared` for a server of one process."""

    is_ready, leases = True, None

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        in_force: Callable[[Served], Choice],
        publish: Callable[[Manifest, Standing], None],
        change: Callable[[Change], Coroutine[Any, Any, dict[str, Any]]],
        current: Callable[[], dict[str, int]],
    ) -> None:
        """in_force, publish: see LocalBooks. change: changes the served models.

        current: returns the current version of each name. Raises ValueError as LocalBooks does.
        """
        self._registry, self._change, self._current = metrics.registry, change, current
        self.books = LocalBooks(settings, in_force, publish, lambda row: self.change(Change(**row)))
        learners = self.books.learners
        if learners is not None:
            metrics.read_learners(lambda: learners)
        if settings.share_of_audits:
            metrics.read_ledgers(lambda: self.books.ledgers.all)

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; see Manager.begin."""
        await manager.begin(artifacts, are_named)
        self._note_current()

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models; raises RequestError."""
        answer = await self._change(change)
        self._note_current()
        return answer

    def _note_current(self) -> None:
        if self.books.learners is not None:
            self.books.learners.set_current(self._current())

    async def scrape(self) -> bytes:
        """The metrics, in the text format of Prometheus."""
        return await asyncio.to_thread(generate_latest, self._registry)

    def start(self) -> None:
        """Start saving audit results, and learning."""
        self.books.start()

    def stop(self) -> None:
        """Stop learning, and save the audit results."""
        self.books.stop()
