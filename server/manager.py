"""Loads, replaces, rolls back and unloads models of a running server, one change at a time."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal
from weakref import ref

from de3.model_store.encoder import Encoders
from de3.model_store.manifest import LEARNED_FROM
from de3.model_store.model import Model
from de3.model_store.store import Artifact, NoModelsError, Store, StoreError, UnknownModelError
from de3.native.network import Memory
from de3.runtime.background import in_background, run_once
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.loading import by_depth, load
from de3.runtime.prove import Prover
from de3.server import memory
from de3.server.audit.audits import Audits
from de3.server.learn.journal import LearnFolder
from de3.server.metrics import Metrics
from de3.server.models import MAX_LOADED, Models, Role, Route
from de3.server.settings import Settings

log = logging.getLogger("de3")
WAIT_S, MAX_WAIT_S = 0.2, 60.0  # interval and limit of the wait for the last requests of an unloaded model


@dataclass(frozen=True)
class Change:
    """A change of the served models that an admin requests.

    Attributes:
        version: version to load or unload; None: load the newest in the store, or unload all that are loaded. Not used
            for a rollback.
        share: share of the requests that a canary answers.
        by_admin: a person's decision: a version that becomes current is pinned, unless `version` is None.
    """

    what: Literal["load", "rollback", "unload"]
    name: str
    version: int | None = None
    role: Role = "current"
    share: float = 0.0
    by_admin: bool = False


@dataclass
class Plan:
    """A change of the served models in the form that every process carries out.

    Attributes:
        artifact: artifact to load; None to unload.
        no_kernels: reason why the kernels cannot run the artifact, as Prover.prove returns it; None before the proof.
        runtime, tau_factor: those of the loaded model; see Ledger.
        seconds: time that loading took.
    """

    change: Change
    artifact: Artifact | None = None
    no_kernels: str | None = None
    runtime: str = ""
    tau_factor: float = 1.0
    seconds: float = 0.0


class Manager:
    """Changes the served models in two steps: prepare, which may fail and does not affect serving, then commit.

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
        memory_of: Callable[[str], Memory | None],
        known: Sequence[Artifact] = (),
    ) -> None:
        """drop_shadows: called with unloaded models, which pending shadow jobs and audits would keep in memory.

        memory_of: returns shared memory for the weights of the encoder with this hash; None if they are not shared
        between processes. known: artifacts that can be loaded even if they are not in the store.
        """
        self._memory_of, self._encoders = memory_of, Encoders()
        self._settings, self._models, self._metrics, self._audits = settings, models, metrics, audits
        self._drop_shadows = drop_shadows
        self._store, self._known = Store(settings.store, settings.state_dir), list(known)
        folder = settings.state_dir if settings.learn else None
        self._learning = None if folder is None else LearnFolder(folder)
        self._learned = None if self._learning is None else self._learning.store
        self._prover = Prover()
        self._changing = asyncio.Lock()
        self._plan: Plan
        self._loaded: Served | None = None  # prepared but not yet served
        self.plans: dict[str, Plan] = {}  # by name:version, the plan that loaded the model

    async def begin(self, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models at startup; the first version of each name is current.

        An invalid artifact is skipped if another one can be served, unless the operator has named the artifacts
        (`are_named`); otherwise raises the artifact's error, usually StoreError or ValueError.
        """
        async with self._changing:
            loaded: dict[str, tuple[Plan, Served]] = {}
            for artifact in sorted(artifacts, key=by_depth):
                plan = Plan(Change("load", artifact.manifest.name), artifact)
                try:
                    loaded[artifact.full_name] = plan, await self._load_or_base(plan, artifact)
                except Exception as error:  # a forged artifact may raise anything
                    if are_named or len(artifacts) == 1:
                        raise
                    log.error("%s is not served: %s", artifact.full_name, error)
                    last = error
            if not loaded and artifacts:
                raise last
            for artifact in artifacts:
                if artifact.full_name in loaded:
                    self._plan, self._loaded = loaded.pop(artifact.full_name)
                    if artifact.manifest.name in self._models.routes:
                        self._plan.change = Change("load", artifact.manifest.name, role="loaded")
                    self.commit()
                    self._note_base(self._plan)

    def _note_base(self, plan: Plan) -> None:
        """If the server starts with a learned version, let a rollback return to the model that it was learned from."""
        if plan.artifact is None or plan.artifact in self._known or plan.change.role != "current":
            return
        name = plan.change.name
        before = self._models.routes[name].before
        before += [a.manifest.version for a in self._known if a.manifest.name == name][:1]

    async def _load_or_base(self, plan: Plan, artifact: Artifact) -> Served:
        """Load a model. If a learned version cannot be loaded, load the model that it was learned from instead."""
        base = next((a for a in self._known if a.manifest.name == artifact.manifest.name), artifact)
        if artifact in self._known:
            return await self._load(plan, artifact)
        try:
            return await self._load(plan, artifact)
        except (StoreError, ValueError, OSError) as error:
            log.error("%s is not served: %s", artifact.full_name, error)
            plan.artifact, plan.no_kernels = base, None
            return await self._load(plan, base)

    def stop(self) -> None:
        """Abort any loading of models, and refuse to load more."""
        self._prover.stop()

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models; returns the body of the admin route's response.

        Raises RequestError if the change is not possible, or while another one is in progress.
        """
        if self._changing.locked():
            raise RequestError("another change of the models is in progress; try again", cause="conflict")
        async with self._changing:
            await self.prepare(await self.plan(change))
            return self.commit() | await self.pin(change)

    async def plan(self, change: Change) -> Plan:
        """The plan of a change, checked but not yet carried out; raises RequestError if the change is not possible."""
        name, version, role = change.name, change.version, change.role
        if change.what == "unload":
            self._models.check_remove(name, version)
            return Plan(change)
        if change.what == "rollback":
            self._models.current(name)
            route = self._models.routes.get(name)
            for trial in ("canary", "shadow"):
                if route is not None and (tried := route.version_in(trial)) is not None:
                    full_name = f"{name}:{tried}"
                    why = f"{full_name} is a {trial}: end it with `de3 models unload {full_name}`"
                    raise RequestError(why, "name", "conflict")
            if route is None or not route.before:
                raise RequestError(f"{name}: no version was current before", "name", "conflict")
            version = route.before[-1]
        elif not change.by_admin and await asyncio.to_thread(self._store.pin, name) is not None:
            raise RequestError(f"{name} is pinned to another version", "name", "conflict")
        artifact = await self._open(name, version)
        if version is None and role == "current" and self._learning is not None:
            artifact = await asyncio.to_thread(self._learning.newest, artifact)
        if change.what == "load" and await asyncio.to_thread(artifact.is_outdated):
            why = "its files have changed since the server started; restart the server to serve them"
            raise RequestError(f"{name}: {why}", "name", "conflict")
        route = self._models.routes.get(name)
        if role != "current" and (route is None or route.current == artifact.manifest.version):
            why = f"{artifact.full_name} is current" if route else f"no version of {name} is current"
            raise RequestError(f"role: {why}, so it cannot be {role}", "role", "conflict")
        if role == "shadow" and artifact.manifest.upstream is not None:
            why = f"{artifact.full_name} has an upstream, which would be called for the shadow's texts, too"
            raise RequestError(f"role: {why}", "role", "conflict")
        loaded = {s.model.full_name for s in self._models.all}
        replaces = route is not None and route.version_in(role) is not None
        if artifact.full_name not in loaded and len(loaded) >= MAX_LOADED and not replaces:
            raise RequestError(f"{MAX_LOADED} models are loaded, the maximum", cause="conflict")
        return Plan(change, artifact)

    async def _open(self, name: str, version: int | None) -> Artifact:
        try:
            return await asyncio.to_thread(self._find, name, version)
        except UnknownModelError as error:
            raise RequestError(str(error), "name", "unknown_model") from None
        except StoreError as error:
            raise self._refused(error) from None

    def _find(self, name: str, version: int | None) -> Artifact:
        """Find an artifact in the store, the learned versions, or the artifacts known since the start.

        Raises StoreError if there is none, or if it is invalid.
        """
        full_name = name if version is None else f"{name}:{version}"
        try:
            return self._store.open(full_name, unpinned=True)
        except (UnknownModelError, NoModelsError) as error:
            if version is not None and self._learned is not None:
                with suppress(UnknownModelError, NoModelsError):
                    return self._learned.open(full_name)
            for artifact in self._known:
                if artifact.manifest.name == name and version in (None, artifact.manifest.version):
                    return artifact
            raise error

    def _refused(self, error: Exception) -> RequestError:
        log.warning("a model was not loaded: %s", error)
        return RequestError(f"not loaded; the served models are unchanged: {error}", "name", "bad_artifact")

    async def prepare(self, plan: Plan) -> None:
        """Load and warm up the model of a plan; nothing is served yet. Raises RequestError for an invalid artifact."""
        self._plan, self._loaded = plan, None
        if plan.artifact is not None:
            try:
                self._loaded = await self._load(plan, plan.artifact)
            except (StoreError, ValueError, OSError) as error:
                raise self._refused(error) from None

    async def _load(self, plan: Plan, artifact: Artifact) -> Served:
        started, runtime = perf_counter(), self._settings.runtime
        if plan.no_kernels is None:
            plan.no_kernels = await in_background(lambda: self._prover.prove(artifact, runtime))
        is_proved = artifact.manifest.precision == "int8" and runtime != "onnxruntime" and not plan.no_kernels
        check, memory_of = self._prover.limit(artifact), self._memory_of if is_proved else lambda _: None
        served = await in_background(
            lambda: load(artifact, self._settings, check, is_proved, memory_of, self._encoders)
        )
        plan.runtime, plan.tau_factor = served.model.runtime, served.monitor.tau_factor
        plan.seconds = perf_counter() - started
        return served

    def commit(self) -> dict[str, Any]:
        """Carry out the prepared plan; returns the body of the admin route's response."""
        plan, change, served = self._plan, self._plan.change, self._loaded
        self._loaded = None
        if served is None:  # the plan is to unload
            gone = self._models.remove(change.name, change.version)
            self._forget(gone)
            return {"unloaded": [one.model.full_name for one in gone]}
        model = served.model
        self.plans[model.full_name] = plan
        self._audits.serve(served)
        self._metrics.add(served)
        self._forget(self._models.add(served, change.role, change.share, change.what == "rollback"))
        log.info(
            "%s is %s (%s), after %.1f s", model.full_name, change.role, model.full_runtime, plan.seconds
        )
        if served.rules.flag is not None:
            log.info(
                "%s: its flag is %s, max_missed %s",
                model.full_name,
                served.rules.flag,
                served.rules.max_missed,
            )
        if served.rules.flag is not None and served.rules.max_missed is None:
            log.warning(
                "%s has a flag, but nothing limits how many flagged texts its early exits miss: set --guarantee-missed "
                "or, once it is calibrated with the flag, --max-missed",
                model.full_name,
            )
        elif self._settings.max_missed is not None and served.rules.default.rule.tau == 0:
            log.warning(
                "%s: no early exit is certified to keep max_missed %g, so all texts run all layers; calibrate it with "
                "more flagged texts",
                *(model.full_name, self._settings.max_missed),
            )
        return {"model": model.full_name, "role": change.role, "runtime": model.runtime}

    async def pin(self, change: Change) -> dict[str, str]:
        """Pin the version that an admin's change made current, or lift the pin if the change names no version.

        Returns fields of the admin route's response: `next_start`, the name:version that the next start with the same
        settings serves, and `reason`; none if that version is damaged, or if the settings name only other models. One
        process calls this, once for each change.
        """
        return await asyncio.to_thread(self._pin, change)

    def _pin(self, change: Change) -> dict[str, str]:
        name, unsaved = change.name, ""
        route = self._models.routes.get(name)
        current = 0 if route is None else route.current
        if change.what != "unload" and change.by_admin and change.role == "current":
            lifts = change.what == "load" and change.version is None
            try:
                self._store.set_pin(name, None if lifts else current)
            except OSError as error:
                unsaved = f"; the pin cannot be saved: {error.filename}: {error.strerror}"
                log.error("%s: the pin cannot be saved: %s", name, error)
        choices: list[tuple[int | None, str]] = [(None, "newest")]
        if (pin := self._store.pin(name)) is not None:
            choices.insert(0, (pin, "pinned"))
        elif self._learned is not None and current > LEARNED_FROM:
            choices.insert(0, (current, "learned"))
        named = [one.partition(":")[2] for one in self._settings.models if one.partition(":")[0] == name]
        if self._settings.models and name not in {one.manifest.name for one in self._known}:
            return {}
        # A learned version was learned from the named one, and is served instead of it.
        is_learned = self._learned is not None and (choices[0][0] or 0) > LEARNED_FROM
        if named and named[0] and not is_learned:
            choices.insert(0, (int(named[0]), "command line"))
        for version, reason in choices:
            with suppress(StoreError):  # the version does not exist or is damaged
                return {"next_start": self._find(name, version).full_name, "reason": reason + unsaved}
        return {}

    def abort(self) -> None:
        """Release the prepared model, which will not be served."""
        self._loaded = None

    async def restore(self, plans: Sequence[Plan], routes: dict[str, Route]) -> None:
        """Load the models that other processes serve, and serve them in the same roles."""
        by_name: dict[str, Served] = {}
        for artifact, plan in sorted(
            ((p.artifact, p) for p in plans if p.artifact), key=lambda pair: by_depth(pair[0])
        ):
            by_name[artifact.full_name] = await self._load(plan, artifact)
        loaded = [by_name[plan.artifact.full_name] for plan in plans if plan.artifact]
        for plan, served in zip(plans, loaded, strict=True):
            self.plans[served.model.full_name] = plan
            self._audits.serve(served)
            self._metrics.add(served)
        self._forget(self._models.restore(loaded, routes))

    def _forget(self, gone: list[Served]) -> None:
        """Remove unloaded models from the metrics and audits; free their memory once they are no longer in use."""
        if gone:
            self._drop_shadows(gone)
        for served in gone:
            self._metrics.drop(served)
            self._audits.forget(served)
            if self._models.find(served.model.full_name) is None:
                self.plans.pop(served.model.full_name, None)
            log.info("%s is unloaded", served.model.full_name)
        run_once("freeing_memory", _give_back([ref(served.model) for served in gone]))


async def _give_back(models: list[ref[Model]]) -> None:
    """Wait until models are freed, at most MAX_WAIT_S, then return free memory to the system."""
    for _ in range(round(MAX_WAIT_S / WAIT_S)):
        if all(model() is None for model in models):
            break
        await asyncio.sleep(WAIT_S)
    await asyncio.to_thread(memory.trim)
