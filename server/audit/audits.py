"""The auditors of a process, one for each served model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from de3.model_store.manifest import Manifest
from de3.server.audit.auditor import Auditor, Traffic
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.background import report
from de3.server.engine.audit import Audit
from de3.server.engine.job import Job
from de3.server.engine.served import Served
from de3.server.errors import RequestError
from de3.server.learn.record import Record
from de3.server.rules import Standing
from de3.server.settings import Settings


class Books(Protocol):
    """The server's ledgers, as a process sees them: its own, or those of the supervisor."""

    def serve(self, served: Served) -> Standing:
        """Start counting for a model, or continue; returns the standing of its ledger."""

    def forget(self, served: Served) -> None:
        """Stop counting for an unloaded model."""

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Count settled texts of a model; see Ledger.count."""

    @property
    def is_behind(self) -> bool:
        """True while the ledgers cannot count as fast as texts are settled; no texts are drawn then."""

    async def report(self, served: Served, live: Live, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see report.report.

        Raises RequestError if the supervisor no longer serves it, or if too many requests wait for its report.
        """

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force, and the reason for it.

        Raises RequestError if the supervisor no longer serves the model.
        """

    def learn(self, name: str, record: Record) -> None:
        """Keep a record of the traffic of a model, name:version, for learning."""

    async def learning(self, name: str, starts: bool) -> dict[str, Any]:
        """The learning report of a model name. starts: also start a fit, as soon as possible.

        Raises RequestError if the name is not served, or if there are too few records for the fit.
        """


class Audits:
    """One auditor for each served model; none if audits are off."""

    def __init__(self, settings: Settings, submit: Callable[[Sequence[Audit]], None], books: Books) -> None:
        """submit: enqueues audits."""
        self._settings, self._submit, self._books = settings, submit, books
        self.is_on = settings.share_of_audits > 0
        self._by_model: dict[str, Auditor] = {}
        self._traffic: dict[str, Traffic] = {}  # by model name, on a server that learns

    def serve(self, served: Served) -> None:
        """Start auditing a model, or continue if the same model was reloaded."""
        if not self.is_on:
            return
        name = served.model.full_name
        auditor = self._by_model.get(name)
        if auditor is None or auditor.served.model.manifest != served.model.manifest:

            def count(settled: Sequence[Settled]) -> None:
                self._books.count(name, settled)

            def learn(record: Record) -> None:
                self._books.learn(name, record)

            auditor = self._by_model[name] = Auditor(
                *(served, self._settings, self._submit, count, lambda: self._books.is_behind),
                learn if self._settings.keeps_records else None,
                self._traffic_of(served) if self._settings.learn else None,
            )
        auditor.serve(served, self._books.serve(served))

    def _traffic_of(self, served: Served) -> Traffic:
        name = served.model.manifest.name
        return self._traffic.setdefault(name, Traffic(self._settings.processes or 1))

    def apply(self, manifest: Manifest, standing: Standing) -> None:
        """Apply the standing of a model's ledger, which includes τ."""
        auditor = self._by_model.get(f"{manifest.name}:{manifest.version}")
        if auditor is not None and auditor.served.model.manifest == manifest:
            auditor.apply(standing)

    def forget(self, served: Served) -> None:
        """Stop auditing an unloaded model, and release it."""
        name = served.model.full_name
        auditor = self._by_model.get(name)
        if auditor is not None and auditor.served is served:
            del self._by_model[name]
            self._books.forget(served)

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

    async def report(self, served: Served, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; see report.report.

        Raises RequestError if audits are off, or as Books.report does.
        """
        return await self._books.report(served, self.of(served).live, reader)

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force, and the reason for it.

        Raises RequestError if audits are off, or as Books.reset does.
        """
        self.of(served)
        return await self._books.reset(served)

    async def learning(self, served: Served, starts: bool = False) -> dict[str, Any]:
        """The learning report of a model. starts: also start a fit, as soon as possible.

        Raises RequestError if the server does not learn, or as Books.learning does.
        """
        if not self._settings.learn:
            raise RequestError(
                "the server does not learn; its operator can start it with --learn", cause="conflict"
            )
        return await self._books.learning(served.model.manifest.name, starts)

    @contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Context manager around the run of a job: draws texts to audit before it, and counts the texts after it."""
        auditor = self.get(job.served)
        if auditor is None:
            yield
            return
        draw = auditor.draw(job)
        try:
            yield
        except BaseException:
            if draw is not None:
                auditor.abandon(job, draw)
            raise
        try:
            auditor.answered(job, draw)
        except Exception as error:  # must not fail a request that was answered
            report("counting_audits", error)
