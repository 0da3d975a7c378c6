"""The audit store in a server of several processes: messages from each process to the supervisor."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from de3.model_store.manifest import Manifest, fingerprint
from de3.model_store.store import Artifact
from de3.runtime.choice import Standing
from de3.runtime.rules import Rules
from de3.server.audit.tenant import Settled, add_settled
from de3.server.learn.record import Record
from de3.server.processes.channel import Channel

MAX_UNSENT_BYTES = 2**20
SEND_S = 0.02  # settled texts and records are collected for this long, then sent together


class RemoteAuditStore:
    """Implements `AuditStore` (audits.py) in one of several processes; the supervisor's `Coordinator` does the work."""

    def __init__(self, channel: Channel, apply: Callable[[Manifest, Standing], None]) -> None:
        """channel: to the supervisor. apply: called with the manifest of a served model whose standing has changed."""
        self._channel, self._apply = channel, apply
        self.report, self.reset, self.learning = (
            partial(channel.call, name) for name in ("report", "reset", "learning")
        )
        self._standings: dict[str, Standing] = {}  # by fingerprint, as are the manifests
        self._manifests: dict[str, Manifest] = {}
        self._settled: dict[str, list[Settled]] = {}  # texts not yet sent, by name:version
        self._records: dict[str, list[Record]] = {}  # records not yet sent, by name:version

    def serve(self, artifact: Artifact, rules: Rules, runtime: str, tau_factor: float) -> Standing:
        """The standing of a model's ledger, as the supervisor last sent it; epoch 0 without τ if it has sent none."""
        key = fingerprint(artifact.manifest)
        self._manifests[key] = artifact.manifest
        return self._standings.get(key, Standing(0, 0, {}))

    def forget(self, manifest: Manifest) -> None:
        """Forget an unloaded model."""
        key = fingerprint(manifest)
        for known in (self._manifests, self._standings):
            known.pop(key, None)

    def published(self, key: str, changed: Standing) -> None:
        """Apply a change of a ledger's standing. key: fingerprint of the manifest; its model may not be served yet."""
        known = self._standings.get(key)
        of_all = {} if known is None or known.epoch != changed.epoch else known.tenants
        self._standings[key] = changed._replace(tenants=of_all | changed.tenants)
        if key in self._manifests:
            self._apply(self._manifests[key], changed)

    @property
    def is_behind(self) -> bool:
        """True while the supervisor does not read as fast as texts are settled."""
        return self._channel.unsent > MAX_UNSENT_BYTES

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Send settled texts to the supervisor, those of several requests together; see Ledger.count."""
        self._send_soon()
        add_settled(self._settled.setdefault(name, []), settled)

    def learn(self, name: str, records: Sequence[Record]) -> None:
        """Send records of a model's traffic to the supervisor, together with others."""
        self._send_soon()
        self._records.setdefault(name, []).extend(records)

    def _send_soon(self) -> None:
        if not self._settled and not self._records:
            asyncio.get_running_loop().call_later(SEND_S, self.send)

    def send(self) -> None:
        """Send the settled texts and the records that were collected."""
        unsent = ("count", self._settled), ("learn", self._records)
        self._settled, self._records = {}, {}
        for method, by_name in unsent:
            for name, values in by_name.items():
                self._channel.tell(method, name, values)
