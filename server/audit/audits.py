"""The auditors of a server's models, and the task that saves what they know."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.audit.auditor import Auditor
from server.audit.log import AuditLog
from server.audit.state import StateDir, fingerprint
from server.engine.work import Job, Served
from server.errors import RequestError
from server.settings import Settings

log = logging.getLogger("de3")
SAVE_S = 2.0  # between two times that what changed is saved: a crash loses as much
MAX_KEPT = 32  # auditors, of unloaded models too, which may come back


class Audits:
    """One auditor for each served model; none where nothing is audited."""

    def __init__(self, settings: Settings, submit: Callable[[Job], None]) -> None:
        """submit: enqueues a job. Raises ValueError for a folder or a file that cannot be written."""
        self._settings, self._submit = settings, submit
        self.is_on = settings.share_of_audits > 0
        self._by_model: dict[str, tuple[str, Auditor]] = {}  # and the model's fingerprint
        state_dir, log_audits = settings.state_dir, settings.log_audits
        self._state = StateDir(state_dir) if self.is_on and state_dir is not None else None
        self._log = AuditLog(log_audits, settings.log_audit_texts) if log_audits is not None else None
        self._saving: asyncio.Task[None] | None = None

    def serve(self, served: Served) -> None:
        """Audit a model from now on; one that was served before goes on where it was."""
        if not self.is_on:
            return
        name, mark = served.model.full_name, fingerprint(served.model.manifest)
        known = self._by_model.pop(name, None)
        if known is not None and known[0] == mark:
            known[1].serve(served)
        else:
            known = mark, Auditor(served, self._settings, self._submit, self._log)
            if self._state is not None:
                self._state.read(known[1])
        self._by_model[name] = known
        while len(self._by_model) > MAX_KEPT:
            del self._by_model[next(iter(self._by_model))]

    def get(self, served: Served) -> Auditor | None:
        """The auditor of a model; None where nothing is audited."""
        known = self._by_model.get(served.model.full_name)
        return None if known is None else known[1]

    def of(self, served: Served) -> Auditor:
        """The auditor of a model; raises RequestError where nothing is audited."""
        auditor = self.get(served)
        if auditor is None:
            raise RequestError(
                "this server audits nothing; its operator starts audits with --audit-share or --guarantee",
                cause="conflict",
            )
        return auditor

    @contextmanager
    def watch(self, job: Job) -> Iterator[None]:
        """While a job is submitted and answered: draws some of its texts before, and counts them after."""
        auditor = self.get(job.served)
        if auditor is None:
            yield
            return
        auditor.draw(job)
        try:
            yield
        except BaseException:
            auditor.abandon(job)
            raise
        try:
            auditor.answered(job)
        except Exception:  # it was answered
            log.exception("the texts of a request were answered, but not counted for audits")

    def start(self) -> None:
        """Begin to save what changes; once the models are loaded."""
        if self._state is not None:
            self._saving = asyncio.create_task(self._save_often())

    async def _save_often(self) -> None:
        failed = False
        while True:
            await asyncio.sleep(SAVE_S)
            for write in self._writers():
                try:
                    await asyncio.to_thread(write)
                    failed = False
                except OSError as error:
                    if not failed:
                        log.error("state_dir: cannot be written, tried again every %g s: %s", SAVE_S, error)
                    failed = True

    def _writers(self) -> Iterator[Callable[[], None]]:
        for _, auditor in list(self._by_model.values()):
            if self._state is not None and auditor.is_changed:
                auditor.is_changed = False
                yield self._state.writer(auditor)

    def stop(self) -> None:
        """Save what is known, and close the files; called once nothing is answered any more."""
        for write in self._writers():
            try:
                write()
            except OSError as error:
                log.error("state_dir: what the last audits showed is lost: %s", error)
        if self._state is not None:
            self._state.close()
        if self._log is not None:
            self._log.close()
