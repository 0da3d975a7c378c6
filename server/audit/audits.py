"""The auditors of a process, one for each served model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from de3.exits.reading import Reading
from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.runtime.background import report
from de3.runtime.choice import Standing
from de3.runtime.engine.audit import Audit
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Text
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.rules import Rules
from de3.runtime.upstream.answer import Asks, reading_of
from de3.runtime.upstream.usage import Query
from de3.server.audit.auditor import LEARN_CALLS, LEARN_TEXTS, Auditor, Traffic
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.learn.record import Record
from de3.server.settings import Settings

AUDIT_S = 60.0  # time limit of an upstream's answer to an audited text, with all attempts


class AuditStore(Protocol):
    """The counted audits and the records of a server: a `Coordinator`, or a connection to the supervisor's."""

    def serve(self, artifact: Artifact, rules: Rules, runtime: str, tau_factor: float) -> Standing:
        """Start counting for a model, or continue; returns its ledger's Standing. See Ledgers.serve."""

    def forget(self, manifest: Manifest) -> None:
        """Stop counting for an unloaded model."""

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model, name:version; see Ledger.count."""

    @property
    def is_behind(self) -> bool:
        """True while texts are settled faster than they can be counted; no texts are drawn then."""

    async def report(self, name: str, level: int, reader: str | None) -> dict[str, Any]:
        """The audit results of a model, name:version, at a load level; see report.report.

        Raises RequestError if the model is no longer served, or if too many requests are waiting for its report.
        """

    async def reset(self, name: str, level: int) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force at a load level, and the reason.

        Raises RequestError if the model is no longer served.
        """

    def learn(self, name: str, records: Sequence[Record]) -> None:
        """Keep records of the traffic of a model, name:version, for learning."""

    async def learning(self, name: str, starts: bool) -> dict[str, Any]:
        """The learning report of a model name. starts: also start a fit, as soon as possible.

        Raises RequestError if the name is not served, or if there are too few records for the fit.
        """


class Audits:
    """One auditor for each served model; none if audits are off."""

    def __init__(
        self,
        settings: Settings,
        submit: Callable[[Sequence[Audit]], None],
        level: Callable[[], int],
        store: AuditStore,
        upstreams: Asks,
    ) -> None:
        """submit: enqueues audits. level: returns the load level."""
        self._settings, self._submit, self._level, self._store = settings, submit, level, store
        self._upstreams = upstreams
        self.is_on = settings.share_of_audits > 0
        self._by_model: dict[str, Auditor] = {}
        self._traffic: dict[str, Traffic] = {}  # by model name, on a server that learns

    def serve(self, served: Served) -> None:
        """Start auditing a model, or continue if the same model was reloaded."""
        if not self.is_on:
            return
        model, name = served.model, served.model.full_name
        auditor = self._by_model.get(name)
        if auditor is None or auditor.served.model.manifest != model.manifest:
            auditor = self._by_model[name] = Auditor(
                *(served, self._settings, self._submit, partial(self._store.count, name)),
                lambda: self._store.is_behind,
                partial(self._store.learn, name) if self._settings.keeps_records else None,
                self._traffic_of(served) if self._settings.learn else None,
                None if model.manifest.upstream is None else partial(self._ask, model.manifest),
            )
        artifact, tau_factor = Artifact(model.path, model.manifest), served.monitor.tau_factor
        auditor.serve(served, self._store.serve(artifact, served.rules, model.runtime, tau_factor))

    async def _ask(self, manifest: Manifest, text: Text, client: str) -> Reading:
        """The answer of a model's upstream to an audited text, as the reading of an exit; raises RequestError."""
        reply = await self._upstreams.ask(manifest.name, Query(text, "audit", client, True), AUDIT_S, False)
        return reading_of(reply, manifest.num_layers, len(manifest.labels))

    def _traffic_of(self, served: Served) -> Traffic:
        name = served.model.manifest.name
        first = LEARN_TEXTS if served.model.manifest.upstream is None else LEARN_CALLS
        return self._traffic.setdefault(name, Traffic(self._settings.processes or 1, first))

    def apply(self, manifest: Manifest, standing: Standing) -> None:
        """Apply the standing of a model's ledger, which includes τ."""
        auditor = self._by_model.get(manifest.full_name)
        if auditor is not None and auditor.served.model.manifest == manifest:
            auditor.apply(standing)

    def forget(self, served: Served) -> None:
        """Stop auditing an unloaded model, and release it."""
        name = served.model.full_name
        auditor = self._by_model.get(name)
        if auditor is not None and auditor.served is served:
            del self._by_model[name]
            self._store.forget(served.model.manifest)

    def get(self, served: Served) -> Auditor | None:
        """The auditor of a model; None if audits are off, or if the model was unloaded."""
        return self._by_model.get(served.model.full_name)

    def of(self, served: Served) -> Auditor:
        """The auditor of a model; raises RequestError if audits are off."""
        auditor = self.get(served)
        if auditor is None:
            raise RequestError(
                "audits are off; the server's operator can enable them with --audit-share or --guarantee",
                cause="conflict",
            )
        return auditor

    def live(self, name: str) -> Live | None:
        """The current state of the audits of a model, name:version; None if it is not audited."""
        one = self._by_model.get(name)
        return None if one is None else Live(one.share, one.pending, one.excluded)

    async def report(self, served: Served, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see AuditStore.report. Also raises RequestError if audits are off."""
        self.of(served)
        return await self._store.report(served.model.full_name, self._level(), reader)

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; see AuditStore.reset. Also raises RequestError if audits are off."""
        self.of(served)
        return await self._store.reset(served.model.full_name, self._level())

    async def learning(self, served: Served, starts: bool = False) -> dict[str, Any]:
        """The learning report of a model; see AuditStore.learning. Raises RequestError if the server does not learn."""
        if not self._settings.learn:
            raise RequestError(
                "the server does not learn; its operator can enable it with --learn", cause="conflict"
            )
        return await self._store.learning(served.model.manifest.name, starts)

    @contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Context manager around the run of a job: draws texts to audit, and counts them afterwards."""
        drawn = [
            (auditor, part, auditor.draw(job, part))
            for part in job.parts
            if (auditor := self.get(part.served))
        ]
        try:
            yield
        except BaseException:
            for auditor, part, draw in drawn:
                if draw is not None:
                    auditor.abandon(job, part, draw)
            raise
        for auditor, part, draw in drawn:
            try:
                auditor.answered(job, part, draw)
            except Exception as error:  # an error here must not fail a request that was answered
                report("counting_audits", error)
