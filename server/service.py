"""A running server's parts and state (loading, ready, draining, stopping or failed); independent of protocols."""

import asyncio
import faulthandler
import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any

from de3.model_store.manifest import Manifest, base_of
from de3.model_store.store import Artifact, Store
from de3.native.network import Memory
from de3.runtime.background import keep_running
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.served import Served
from de3.runtime.engine.timing import run_longest
from de3.runtime.errors import RequestError
from de3.runtime.prove import recorded
from de3.runtime.upstream.undelivered import Undelivered
from de3.server import memory
from de3.server.admission import Admission
from de3.server.audit.audits import Audits
from de3.server.int8 import Int8Check
from de3.server.learn.journal import LearnFolder
from de3.server.manager import Manager
from de3.server.metrics import Metrics
from de3.server.models import Models, default_of, find, newest
from de3.server.questions import read_questions, rows_of
from de3.server.settings import Settings
from de3.server.shared import OneProcess, Shared

log = logging.getLogger("de3")
CHECK_S = 1.0  # interval between checks of the engine threads, and of the event loop
HUNG_CHECKS = 30  # checks without an answer of the event loop, after which the process ends
TRIM_CHECKS = 10  # checks between two returns of free memory to the system


class EngineError(Exception):
    """An engine thread died or is stuck."""


def _on(loop: asyncio.AbstractEventLoop) -> Callable[[Callable[[], None]], None]:
    """A function that schedules callbacks on an event loop; safe to call from any thread."""

    def dispatch(callback: Callable[[], None]) -> None:
        try:  # noqa: SIM105  # contextlib.suppress takes three calls for each wake-up
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: no request is waiting
            pass

    return dispatch


class Service:
    """Settings, models, engine and metrics of a server.

    Manifests are read at construction, so that an invalid store or an unknown name raises StoreError before the port
    opens. The models are loaded afterwards, while /health already responds.
    """

    def __init__(
        self,
        settings: Settings,
        artifacts: Sequence[Artifact] = (),
        shared: Shared | None = None,
        memory_of: Callable[[str], Memory | None] = lambda _: None,
    ) -> None:
        """artifacts: served in addition to the models of the store that the settings name.

        shared: state that the processes of a server share; None: this is the only process. memory_of: see Manager.
        Raises ValueError as Coordinator does, if this is the only process.
        """
        self.settings = settings
        store = self._store = Store(settings.store, settings.state_dir)
        found = self._found = find(store, settings.models, artifacts)
        self.artifacts: list[Artifact] = found
        if settings.state_dir is not None:
            folder = LearnFolder(settings.state_dir)
            learned = [folder.served_before(one, store.pin(one.manifest.name)) for one in found]
            self.artifacts = learned if settings.learn else found
            for one in (one for one in learned if one not in self.artifacts):
                log.warning("%s was learned before, and is not served without --learn", one.full_name)
        self.questions = read_questions(settings.questions)
        self._are_named = bool(settings.models or artifacts)
        deepest = max(a.manifest.num_layers for a in [*self.artifacts, *newest(store)])
        default = default_of(settings, self.artifacts, self._are_named)
        self.models = Models(default, settings.targets, settings.default_model is not None)
        self.metrics = Metrics(settings, deepest, lambda: self.admission.level)
        self.admission = Admission(settings, self.models)
        self.engine = Engine(settings.engine_threads(), self.admission.texts.most, self.metrics.texts.observe)
        self.shared = shared or OneProcess(settings, self.metrics, self.models, lambda: self.audits)
        self.audits = Audits(
            *(settings, self.engine.audit, lambda: self.admission.level, self.shared.audit_store),
            self.shared.upstreams,
        )
        if self.audits.is_on:
            self.metrics.read_audits(self.audits.get)
        self.manager = Manager(
            *(settings, self.models, self.metrics, self.audits, self.engine.drop_shadows, memory_of),
            found,
        )
        self.int8 = Int8Check(found, settings.runtime, self.metrics.registry)
        self.undelivered = Undelivered()
        self.state = "loading"
        self.is_open = False  # True once the models are loaded
        self.end_of_loading = asyncio.Event()
        self.in_flight = 0  # requests, of all protocols
        self.metrics.read_from(
            self.engine.queue.__len__,
            lambda: self.state == "ready",
            lambda: self.in_flight,
        )
        self.failure: Exception | None = None

    async def load(self, on_failure: Callable[[], None]) -> None:
        """Load and warm up the models, then become ready.

        on_failure: called if loading fails, or if the engine fails later; `failure` is then the reason.
        """
        if self.is_open:  # on Ray, a replica loads its models before its application starts
            return
        try:
            started = perf_counter()
            await self.shared.begin(self.manager, self.artifacts, self._are_named)
            self.admission.start(self.engine)
            models = [served.model for served in self.models.all]
            loop = asyncio.get_running_loop()
            self.engine.start(lambda: run_longest(models), _on(loop), loop.call_soon)
            self.shared.start()
            keep_running("engine_watchdog", lambda: self._watch_engine(on_failure))
            Thread(target=self._watch_loop, args=(loop,), name="loop-watchdog", daemon=True).start()
            # Most objects that exist now are permanent. Later garbage collections, which delay requests, skip them.
            gc.collect()
            gc.freeze()
            self.is_open = True
            self.end_of_loading.set()
            if self.state == "loading":
                self.state = "ready"
            log.info(
                "ready in %.1f s: %s, %d engine threads",
                perf_counter() - started,
                ", ".join(
                    f"{s.model.full_name} ({s.model.full_runtime}, τ = {s.rules.default.rule.tau:.4g})"
                    for s in self.models.all
                ),
                self.settings.engine_threads(),
            )
        except Exception as error:
            self.failure = error
            on_failure()

    async def _watch_engine(self, on_failure: Callable[[], None]) -> None:
        """Stop the server if an engine thread dies or hangs, so that a supervisor can restart it."""
        for check in count(1):
            if self.state == "stopping":
                return
            if (problem := self.engine.problem()) and self.state != "stopping":
                break
            await asyncio.sleep(CHECK_S)
            if check % TRIM_CHECKS == 0:
                gc.collect()  # cheap, as most objects are frozen
                await asyncio.to_thread(memory.trim)
        log.critical("%s; stopping the server", problem)
        self.state = "failed"
        self.metrics.engine_failures.inc()
        self.failure = EngineError(problem)
        on_failure()

    def _watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the process if its event loop hangs, for example in a kernel: nothing else could stop the server then.

        Checks are counted, not seconds, so that a suspended process does not count as hung.
        """
        while self.state not in ("stopping", "failed"):
            answered, checks = Event(), 0
            _on(loop)(answered.set)
            while not answered.wait(CHECK_S):
                checks += 1
                if not loop.is_running() or self.state in ("stopping", "failed"):
                    return
                if checks == HUNG_CHECKS:
                    log.critical("the event loop has not answered for %d s; ending the process", checks)
                    faulthandler.dump_traceback()
                    os._exit(1)
            sleep(CHECK_S)

    def drain(self) -> None:
        """Report not ready; requests are still answered until stop()."""
        if self.state != "failed":
            self.state = "draining"
        self.end_of_loading.set()

    def stop(self) -> None:
        """Finish the accepted requests, end the engine's threads, and stop the shared state; blocks until then.

        Any loading of models is aborted.
        """
        if self.state != "failed":
            self.state = "stopping"
        self.manager.stop()
        self.engine.stop()
        self.shared.stop()

    async def status(self) -> str:
        """The state of the server: it is ready once one of its processes is."""
        are_ready = self.state == "loading" and await self.shared.others_ready()
        return "ready" if are_ready else self.state

    async def wait_until_open(self) -> None:
        """If another process is ready, wait until the models are loaded here, too, for at most timeout_s.

        So the answer to a request never contradicts /ready.
        """
        if not self.is_open and await self.shared.others_ready():
            with suppress(TimeoutError):
                await asyncio.wait_for(self.end_of_loading.wait(), self.settings.timeout_s)

    def check_open(self) -> None:
        """Raise RequestError while the models load. A draining server still answers requests."""
        if not self.is_open:
            raise RequestError("the models are still loading", cause="loading", retry_after_s=1)

    def manifests(self) -> list[Manifest]:
        """Manifests of the served models, or of those that are being loaded."""
        if self.is_open:
            return [served.model.manifest for served in self.models.all]
        return [artifact.manifest for artifact in self.artifacts]

    def stored(self) -> dict[str, dict[str, Any]]:
        """Fields of the served versions in /v1/models from files, by name:version; any thread may call it."""
        runtime = self.settings.runtime
        int8 = {base_of(a.manifest): recorded(a, runtime).get("int8") for a in self._found}
        return {
            m.full_name: {"is_pinned": self._store.pin(m.name) == m.version, "int8": int8.get(base_of(m))}
            for m in self.manifests()
        }

    def role(self, manifest: Manifest) -> dict[str, Any]:
        """Fields of a served version in /v1/models; empty while the models load.

        They are its role, share (of a canary only), is_default, aliases, runtime and instructions, its flag and
        max_missed (see Rules), the questions that it answers without a file, and the models that can answer a request
        with it on one pass.
        """
        if not self.is_open:
            return {}
        role = self.models.role_of(manifest)
        served = self.models.current(manifest.full_name)
        model, flag = served.model, served.rules.flag
        runtime: dict[str, Any] = {"runtime": model.runtime, "instructions": model.instructions or None}
        runtime |= {"flag": None if flag is None else flag._asdict(), "max_missed": served.rules.max_missed}
        runtime["questions"] = rows_of(manifest, flag)
        share = {"share": self.models.routes[manifest.name].share} if role == "canary" else {}
        names = {
            "is_default": self.models.is_default(manifest.name),
            "aliases": self.models.aliases_of(manifest),
            "shares_encoder_with": [
                other.full_name
                for other in (one.model for one in self.models.all)
                if other is not model and (model.can_run(other) or other.can_run(model))
            ],
        }
        return {"role": role, **share, **names, **runtime}

    def current(self, name: str | None) -> Served:
        """The current version of a name, or the version with this alias (see models.aliases).

        name: None for the default name. Raises RequestError if there is no such version, or while the models load.
        """
        self.check_open()
        return self.models.current(self.models.default_name() if name is None else name)

    def manifest(self, name: str | None) -> Manifest:
        """Manifest of the version that current() returns; raises RequestError as current() does."""
        return self.current(name).model.manifest
