"""Loads, replaces, rolls back and unloads models of a running server, one change at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import perf_counter
from weakref import ref

from de3.model_store.model import Model
from de3.model_store.store import Artifact, Store, StoreError, UnknownModelError
from de3.server import memory
from de3.server.audit.audits import Audits
from de3.server.background import in_background
from de3.server.engine.served import Served
from de3.server.errors import RequestError
from de3.server.metrics import Metrics
from de3.server.models import MAX_LOADED, Models, Role, load
from de3.server.prove import Prover
from de3.server.settings import Settings

log = logging.getLogger("de3")
WAIT_S, MAX_WAIT_S = 0.2, 60.0  # interval and limit of the wait for the last requests of an unloaded model


class Manager:
    """Changes the served models.

    A model is loaded and warmed up before it replaces another, so an invalid artifact changes nothing. A request in
    flight keeps its model.
    """

    def __init__(
        self,
        settings: Settings,
        models: Models,
        metrics: Metrics,
        audits: Audits,
        drop_shadows: Callable[[Sequence[Served]], None],
    ) -> None:
        """drop_shadows: called with unloaded models, which pending shadow jobs and audits would keep in memory."""
        self._settings, self._models, self._metrics, self._audits = settings, models, metrics, audits
        self._drop_shadows = drop_shadows
        self._store = Store(settings.store)
        self._prover = Prover()
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; the first version of each name is current.

        An invalid artifact is skipped unless the operator has named it. Raises StoreError or ValueError if a named one
        is invalid, or no valid one is left.
        """
        async with self._changing:
            for artifact in artifacts:
                is_first = artifact.manifest.name not in self._models.routes
                try:
                    await self._serve(artifact, "current" if is_first else "beside")
                except Exception as error:  # a forged artifact may raise anything
                    if are_named or (artifact is artifacts[-1] and not self._models.routes):
                        raise
                    log.error("%s is not served: %s", artifact.full_name, error)

    def stop(self) -> None:
        """Abort any loading of models, and refuse to load more."""
        self._prover.stop()

    async def load(
        self, name: str, version: int | None = None, role: Role = "current", share: float = 0.0
    ) -> Served:
        """Load a version (default: the newest) from the store and serve it; raises RequestError."""
        async with self._one_change():
            artifact = await self._open(name, version)
            route = self._models.routes.get(name)
            if role != "current" and (route is None or route.current == artifact.manifest.version):
                why = f"{artifact.full_name} is current" if route else f"no version of {name} is current"
                raise RequestError(f"role: {why}, so it cannot be {role}", "role", "conflict")
            return await self._change(artifact, role, share)

    async def roll_back(self, name: str) -> Served:
        """Make the previous current version current again; raises RequestError."""
        async with self._one_change():
            self._models.get(name)
            route = self._models.routes.get(name)
            if route is None or not route.before:
                raise RequestError(f"{name}: no version was current before", "name", "conflict")
            artifact = await self._open(name, route.before[-1])
            return await self._change(artifact, "current", back=True)

    async def unload(self, name: str, version: int | None = None) -> list[Served]:
        """Stop serving a version, or all versions of a name; raises RequestError."""
        async with self._one_change():
            gone = self._models.remove(name, version)
            self._forget(gone)
            return gone

    @asynccontextmanager
    async def _one_change(self) -> AsyncIterator[None]:
        if self._changing.locked():
            raise RequestError("another change of the models is in progress; try again", cause="conflict")
        async with self._changing:
            yield

    async def _open(self, name: str, version: int | None) -> Artifact:
        try:
            return await asyncio.to_thread(self._store.open, name if version is None else f"{name}:{version}")
        except UnknownModelError as error:
            raise RequestError(str(error), "name", "unknown_model") from None
        except StoreError as error:
            raise self._refused(error) from None

    async def _change(self, artifact: Artifact, role: Role, share: float = 0.0, back: bool = False) -> Served:
        loaded = {s.model.full_name for s in self._models.all}
        route = self._models.routes.get(artifact.manifest.name)
        replaces = route is not None and route.version_in(role) is not None
        if artifact.full_name not in loaded and len(loaded) >= MAX_LOADED and not replaces:
            raise RequestError(f"{MAX_LOADED} models are loaded, the maximum", cause="conflict")
        try:
            return await self._serve(artifact, role, share, back)
        except (StoreError, ValueError, OSError) as error:
            raise self._refused(error) from None

    def _refused(self, error: Exception) -> RequestError:
        log.warning("a model was not loaded: %s", error)
        return RequestError(f"not loaded; the served models are unchanged: {error}", "name", "bad_artifact")

    async def _serve(self, artifact: Artifact, role: Role, share: float = 0.0, back: bool = False) -> Served:
        started = perf_counter()
        runtime = self._settings.runtime
        no_kernels = await in_background(lambda: self._prover.prove(artifact, runtime))
        is_proved = artifact.manifest.precision == "int8" and runtime != "onnxruntime" and not no_kernels
        check = self._prover.limit(artifact)
        served = await in_background(lambda: load(artifact, self._settings, check, is_proved))
        self._audits.serve(served)
        self._metrics.add(served)
        self._forget(self._models.add(served, role, share, back))
        log.info(
            "%s is %s (%s), after %.1f s",
            *(artifact.full_name, role, served.model.full_runtime, perf_counter() - started),
        )
        return served

    def _forget(self, gone: list[Served]) -> None:
        """Free the memory of models once they are no longer in use."""
        if gone:
            self._drop_shadows(gone)
        for served in gone:
            self._metrics.drop(served)
            self._audits.forget(served)
            log.info("%s is unloaded", served.model.full_name)
        task = asyncio.create_task(_give_back([ref(served.model) for served in gone]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _give_back(models: list[ref[Model]]) -> None:
    """Wait until models are freed, then return their memory to the system."""
    for _ in range(round(MAX_WAIT_S / WAIT_S)):
        if all(model() is None for model in models):
            break
        await asyncio.sleep(WAIT_S)
    await asyncio.to_thread(memory.trim)
