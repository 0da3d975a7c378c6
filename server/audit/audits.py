"""The auditors of a server's models, and the task that saves their state."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from de3.server.audit.auditor import Auditor
from de3.server.audit.log import AuditLog
from de3.server.audit.state import State, StateDir, fingerprint, restore, state_of
from de3.server.engine.audit import Audit
from de3.server.engine.job import Job
from de3.server.engine.served import Served
from de3.server.errors import RequestError
from de3.server.failures import FailureLog
from de3.server.rules import Choice
from de3.server.settings import Settings

log = logging.getLogger("de3")
failures = FailureLog(log)
SAVE_S = 2.0  # interval between saves; a crash loses the audits since the last one
MAX_KEPT = 32  # states of unloaded models, which may be loaded again


class Audits:
    """One auditor for each served model; none if audits are off."""

    def __init__(
        self,
        settings: Settings,
        submit: Callable[[Sequence[Audit]], None],
        in_force: Callable[[Served], Choice],
    ) -> None:
        """submit, in_force: see Auditor. Raises ValueError if state_dir or log_audits cannot be written."""
        self._settings, self._submit, self._in_force = settings, submit, in_force
        self.is_on = settings.share_of_audits > 0
        self._by_model: dict[str, Auditor] = {}
        self._unloaded: dict[str, State] = {}
        state_dir, log_audits = settings.state_dir, settings.log_audits
        self._state = StateDir(state_dir) if self.is_on and state_dir is not None else None
        self._log = AuditLog(log_audits, settings.log_audit_texts) if log_audits is not None else None
        self._saving: asyncio.Task[None] | None = None
        self._writing, self._has_failed = Lock(), False

    def serve(self, served: Served) -> None:
        """Start to audit a model. If it was served before, its earlier evidence is kept."""
        if not self.is_on:
            return
        name = served.model.full_name
        known = self._by_model.get(name)
        if known is not None and known.served.model.manifest == served.model.manifest:  # reloaded
            known.serve(served)
            return
        auditor = self._by_model[name] = Auditor(
            served, self._settings, self._submit, self._in_force, self._log
        )
        state = self._unloaded.pop(name, None)
        if state is not None and state.fingerprint == fingerprint(served.model.manifest):
            restore(auditor, state)
        elif self._state is not None:
            self._state.read(auditor)

    def forget(self, served: Served) -> None:
        """Stop auditing an unloaded model. Its evidence is kept; the model is released."""
        name = served.model.full_name
        auditor = self._by_model.get(name)
        if auditor is None or auditor.served is not served:
            return
        self._save(auditor)
        del self._by_model[name]
        self._unloaded[name] = state_of(auditor)
        while len(self._unloaded) > MAX_KEPT:
            del self._unloaded[next(iter(self._unloaded))]

    def get(self, served: Served) -> Auditor | None:
        """The auditor of a model; None if audits are off."""
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

    @contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """Context in which a job is submitted and answered: draws texts to audit before, and counts texts after."""
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
        except Exception:  # the request was answered
            failures.exception("the texts of a request were answered, but not counted for audits")

    def start(self) -> None:
        """Start the task that saves changes; called once the models are loaded."""
        if self._state is not None:
            self._saving = asyncio.create_task(self._save_often())

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            for auditor in list(self._by_model.values()):
                await asyncio.to_thread(self._save, auditor)

    def _save(self, auditor: Auditor) -> None:
        with self._writing:
            if self._state is None or not auditor.is_changed:
                return
            auditor.is_changed = False
            try:
                self._state.write(auditor)
                self._has_failed = False
            except Exception as error:  # no error must prevent the server from answering requests
                auditor.is_changed = True
                if not self._has_failed:
                    log.error("state_dir: cannot be written; retrying every %g s: %s", SAVE_S, error)
                self._has_failed = True

    def stop(self) -> None:
        """Save all evidence and close the files; called once no more requests are answered."""
        for auditor in list(self._by_model.values()):
            self._save(auditor)
        with self._writing:
            if self._state is not None:
                self._state.close()
            self._state = None
        if self._log is not None:
            self._log.close()
