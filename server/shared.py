"""State that the processes of a server share, and its implementation for a server of one process."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from prometheus_client import generate_latest

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.runtime.choice import Standing
from de3.runtime.upstream.answer import Asks
from de3.server.audit.audits import Audits, AuditStore
from de3.server.audit.coordinator import Coordinator
from de3.server.audit.report import Live
from de3.server.manager import Change, Manager
from de3.server.metrics import Metrics, register_results
from de3.server.models import Models
from de3.server.settings import Settings


class Leases(NamedTuple):
    """Rate limits that the supervisor keeps for all processes.

    Attributes:
        lease: takes texts from an owner's limit; raises RequestError if the limit does not permit that many.
        charge: counts texts that already ran, even beyond the owner's limit.
    """

    lease: Callable[[str, int], Awaitable[None]]
    charge: Callable[[str, int], None]


class Shared(Protocol):
    """The server as a whole, as one of its processes sees it."""

    @property
    def audit_store(self) -> AuditStore:
        """The counted audits."""

    @property
    def upstreams(self) -> Asks:
        """The upstreams of models."""

    @property
    def leases(self) -> Leases | None:
        """Rate limits of all processes; None: this is the only process."""

    async def others_ready(self) -> bool:
        """True if a process of the server answers requests; False if this is the only process."""

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; see Manager.begin."""

    async def scrape(self) -> bytes:
        """The metrics of all processes, in Prometheus's text format."""

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models of all processes, or of none; raises RequestError."""

    def start(self) -> None:
        """Hook that is called once the models are loaded."""

    def stop(self) -> None:
        """Hook that is called once no more requests are answered."""


class OneProcess:
    """Implements `Shared` for a server of one process."""

    leases = None

    def __init__(
        self, settings: Settings, metrics: Metrics, models: Models, audits: Callable[[], Audits]
    ) -> None:
        """audits: returns the auditors of this process. Raises ValueError as Coordinator does."""
        self._registry, self._models, self._audits = metrics.registry, models, audits
        self._manager: Manager
        self.audit_store = Coordinator(
            settings, lambda row: self.change(Change(**row)), self._publish, self._live_of, self._sync
        )
        self.upstreams = self.audit_store.upstreams
        register_results(metrics.registry, self.audit_store, metrics.level, settings)

    def _publish(self, manifest: Manifest, standing: Standing) -> None:
        self._audits().apply(manifest, standing)

    async def _live_of(self, name: str) -> list[Live]:
        return [live] if (live := self._audits().live(name)) else []

    async def _sync(self) -> None:
        """Do nothing: a single process applies a new Standing immediately."""

    async def others_ready(self) -> bool:
        """False: there are no others."""
        return False

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; see Manager.begin."""
        self._manager = manager
        await manager.begin(artifacts, are_named)
        self._note_current()

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models; raises RequestError."""
        answer = await self._manager.change(change)
        self._note_current()
        return answer

    def _note_current(self) -> None:
        self.audit_store.set_current({name: route.current for name, route in self._models.routes.items()})

    async def scrape(self) -> bytes:
        """The metrics, in Prometheus's text format."""
        return await asyncio.to_thread(generate_latest, self._registry)

    def start(self) -> None:
        """Start saving audit results, and learning."""
        self.audit_store.start()

    def stop(self) -> None:
        """Stop learning, and save the audit results."""
        self.audit_store.stop()
