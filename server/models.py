"""The loaded models of a server, and the roles of their versions."""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact, NoModelsError, Store, StoreError
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.flags import parsed
from de3.server.settings import Settings

log = logging.getLogger("de3")
MAX_HISTORY = 16  # versions to roll back to
MAX_LOADED = 16


def find(store: Store, wanted: list[str], others: Sequence[Artifact] = ()) -> list[Artifact]:
    """The artifacts to serve, with validated manifests: the wanted ones, or `name` of every model (see Store.open).

    others: artifacts from elsewhere; if there are any, the store's models are served only if `wanted` names them. An
    invalid artifact is skipped unless it is in `wanted`. Raises StoreError if a wanted one is invalid, no valid one is
    left, two from different folders have the same name, or there are more than MAX_LOADED; NoModelsError if the store
    is empty.
    """
    if others:
        found = list({a.path: a for a in [*(store.open(name) for name in wanted), *others]}.values())
        homes = {a.manifest.name: a.path.parent for a in found}
        if twice := next((a for a in found if a.path.parent != homes[a.manifest.name]), None):
            raise StoreError(
                f"two models would be served as {twice.manifest.name}; rename a folder, or serve them separately"
            )
        _check_count(len(found))
        return found
    names = wanted or list(store.versions())
    if not names:
        raise NoModelsError(f"{store.path} holds no model; add one with de3 export")
    _check_count(len(names))
    if wanted:
        return [store.open(name) for name in names]
    artifacts, errors = [], []
    for name in names:
        try:
            artifacts.append(store.open(name))
        except Exception as error:  # a forged manifest may raise anything
            errors.append(error)
            log.error("%s is not served: %s", name, error)
    if not artifacts:
        raise errors[0]
    return artifacts


def _check_count(count: int) -> None:
    if count > MAX_LOADED:
        raise StoreError(f"{count} models to serve; at most {MAX_LOADED} are allowed: choose with --model")


def newest(store: Store) -> list[Artifact]:
    """The newest version of every model in the store, unless its manifest is invalid; it may be loaded later."""
    artifacts = []
    with suppress(NoModelsError):
        for name in store.versions():
            with suppress(Exception):  # an invalid one is reported when it is loaded
                artifacts.append(store.open(name, unpinned=True))
    return artifacts


Role = Literal["current", "canary", "shadow", "loaded"]


@dataclass(slots=True)
class Route:
    """The roles of the versions of one name.

    Attributes:
        current: answers requests that do not name a version.
        canary: answers `share` of these requests instead.
        shadow: also runs the texts of the current version; its answers are compared, not returned.
        before: earlier current versions, the latest last.
    """

    current: int
    canary: int | None = None
    share: float = 0.0
    shadow: int | None = None
    before: list[int] = field(default_factory=list)

    def give(self, role: Role, version: int, share: float = 0.0) -> None:
        """Assign a role to a version, which loses any former role but `current`."""
        if role == "current" and version != self.current:
            self.before = [*self.before, self.current][-MAX_HISTORY:]
            self.current = version
        if role != "canary" and self.canary == version:
            self.canary, self.share = None, 0.0
        if role != "shadow" and self.shadow == version:
            self.shadow = None
        if role == "canary":
            self.canary, self.share = version, share
        if role == "shadow":
            self.shadow = version

    def version_in(self, role: Role) -> int | None:
        """The version in a role; None if there is none, and for `loaded`, which several versions can have."""
        return {"current": self.current, "canary": self.canary, "shadow": self.shadow, "loaded": None}[role]

    def used(self) -> set[int]:
        """The current, canary and shadow versions."""
        return {self.current} | {v for v in (self.canary, self.shadow) if v is not None}


class Models:
    """The loaded models. Only the event loop changes them, each change in one step."""

    def __init__(
        self, default: str | None = None, targets: Mapping[str, str] | None = None, is_set: bool = False
    ) -> None:
        """default: name of the model for requests that do not name one; None: the served model, if there is only one.

        targets: the models' names, by the aliases of the settings. is_set: the settings name the default.
        """
        self.default, self._targets, self._is_set = default, targets or {}, is_set
        self._versions: dict[str, dict[int, Served]] = {}
        self.routes: dict[str, Route] = {}

    @property
    def all(self) -> list[Served]:
        """All loaded models."""
        return [served for versions in list(self._versions.values()) for served in list(versions.values())]

    def find(self, full_name: str) -> Served | None:
        """The loaded model with this name:version; None if there is none."""
        return next((one for one in self.all if one.model.full_name == full_name), None)

    def get(
        self,
        name: str | None,
        fits: Callable[[Manifest], bool] = lambda _: True,
        must_be_set: bool = False,
    ) -> Served:
        """The model that answers a request, perhaps a canary. name: None if the request names no model.

        fits, must_be_set: see default_name. Raises RequestError if the name is not served, or if there is no default.
        """
        if name is not None:
            name = self._resolve(name)
        elif len(self.routes) == 1:  # as default_name says
            (name,) = self.routes
        else:
            name = self.default_name(fits, must_be_set)
        route = self.routes.get(name)
        if route is not None and route.canary is not None and random.random() < route.share:
            return self._versions[name][route.canary]
        return self.current(name)

    def is_default(self, name: str) -> bool:
        """True if this name answers requests that do not name a model."""
        return name == self.default or len(self.routes) == 1

    def default_name(
        self, fits: Callable[[Manifest], bool] = lambda _: True, must_be_set: bool = False
    ) -> str:
        """The name that answers requests that do not name a model: the default, or the only one.

        fits: if it is true for any model, only such models count. must_be_set: the first of the served models is not
        the default, unless the settings say so. Raises RequestError if there is no such name.
        """
        default = None if must_be_set and not self._is_set else self.default
        if default in self.routes and fits(self.current(str(default)).model.manifest):
            return str(default)
        names = [name for name in self.routes if fits(self.current(name).model.manifest)] or list(self.routes)
        if len(names) == 1:
            return names[0]
        if default in names:  # no model fits, and the request's check of this one says why
            return str(default)
        raise RequestError(
            f"model: is required, as several are served: {', '.join(names)}; the server's operator may set a "
            "default with --default-model",
            "model",
        )

    def _resolve(self, name: str) -> str:
        """The name, or name:version, with its model's name in place of an alias."""
        alias, colon, version = name.partition(":")
        return self._targets[alias] + colon + version if alias in self._targets else name

    def current(self, name: str) -> Served:
        """The current version of a name, or the version with this alias; raises RequestError if there is neither."""
        name = self._resolve(name)
        if name in self.routes:
            return self._versions[name][self.routes[name].current]
        served = self.all
        for one in served:
            if name in aliases(one.model.manifest):
                return one
        raise unknown_model(name, [s.model.full_name for s in served])

    def aliases_of(self, manifest: Manifest) -> list[str]:
        """The aliases (--alias) that name this version; an alias of a model that is not served names none."""
        found = []
        for alias in self._targets:
            with suppress(RequestError):
                if self.current(alias).model.full_name == manifest.full_name:
                    found.append(alias)
        return found

    def role_of(self, manifest: Manifest) -> Role:
        """The role of a loaded version."""
        route = self.routes[manifest.name]
        roles: tuple[Role, ...] = ("current", "canary", "shadow")
        return next((r for r in roles if route.version_in(r) == manifest.version), "loaded")

    def shadow_of(self, served: Served) -> Served | None:
        """The shadow of a model; None if it has none, or is not the current version."""
        name = served.model.manifest.name
        route = self.routes.get(name)
        if route is None or route.shadow is None or route.current != served.model.manifest.version:
            return None
        return self._versions[name][route.shadow]

    def add(
        self, served: Served, role: Role = "current", share: float = 0.0, back: bool = False
    ) -> list[Served]:
        """Serve a model in a role; returns the models that it replaces.

        back: true for a rollback, which removes this version and the one that it replaces from the history.
        """
        name, version = served.model.manifest.name, served.model.manifest.version
        before = self.all
        self._versions.setdefault(name, {})[version] = served
        route = self.routes.setdefault(name, Route(version))
        used, earlier = route.used(), route.before[:-1]
        route.give(role, version, share)
        if back:
            route.before = earlier
        for lost in used - route.used() - {version}:
            del self._versions[name][lost]
        return _gone(before, self.all)

    def check_remove(self, name: str, version: int | None) -> None:
        """Raise RequestError unless a version, or all versions of a name, can be removed."""
        if name not in self.routes:  # not even as an alias, which several versions may share
            raise unknown_model(name, list(self.routes))
        self.current(name if version is None else f"{name}:{version}")
        if version is None or self._versions[name].keys() == {version}:
            if len(self.routes) == 1:
                raise RequestError(f"{name} is the only model that is served", "name", "conflict")
        elif version == self.routes[name].current:
            others = ", ".join(f"{name}:{v}" for v in self._versions[name] if v != version)
            raise RequestError(
                f"version: {name}:{version} is the current version of {name}; load another as current first "
                f"(loaded: {others}), or unload all of {name}",
                "version",
                "conflict",
            )

    def remove(self, name: str, version: int | None) -> list[Served]:
        """Stop serving a version, or all versions of a name; returns the removed models.

        Raises RequestError as check_remove does.
        """
        self.check_remove(name, version)
        before = self.all
        if version is None or self._versions[name].keys() == {version}:
            del self.routes[name], self._versions[name]
        else:
            self.routes[name].give("loaded", version)
            del self._versions[name][version]
        return _gone(before, self.all)

    def restore(self, served: Sequence[Served], routes: dict[str, Route]) -> list[Served]:
        """Serve models in the roles that they have in another process; returns the models that they replace."""
        before, self._versions, self.routes = self.all, {}, routes
        for one in served:
            self._versions.setdefault(one.model.manifest.name, {})[one.model.manifest.version] = one
        return _gone(before, self.all)


def _gone(before: list[Served], after: list[Served]) -> list[Served]:
    return [s for s in before if not any(s is other for other in after)]


def default_of(settings: Settings, artifacts: list[Artifact], are_named: bool) -> str | None:
    """The name that answers requests that do not name a model; None: there is no default.

    are_named: the operator has named the artifacts, so the first is the default. Raises StoreError if the default model
    of the settings, or the model of an alias or a flag, is not served, and for an alias that is the name of a served
    model.
    """
    served = list(dict.fromkeys(a.manifest.name for a in artifacts))

    def name_of(model: str, flag: str) -> str:
        name = next((a.manifest.name for a in artifacts if model in aliases(a.manifest)), model)
        if name not in served:
            raise StoreError(f"{flag}: {model} is not served; available: {', '.join(served)}")
        return name

    for alias, target in settings.targets.items():
        if alias in served:
            raise StoreError(f"--alias {alias}={target}: {alias} is the name of a served model")
        name_of(target, f"--alias {alias}={target}")
    for option, of in (("flag", map(parsed, settings.flags)), ("long", settings.long)):
        for known, _ in of:
            if known:  # otherwise it is that of all models
                name_of(known, f"--{option} {known}=…")
    name = settings.default_model
    if name is None:  # the only model at startup remains the default when others are loaded
        return served[0] if are_named or len(served) == 1 else None
    return name_of(settings.targets.get(name, name), "--default-model")


def aliases(manifest: Manifest) -> list[str]:
    """Other names of a version: name:version, and its source (a hub id or folder) with and without @revision."""
    source = manifest.source or ""
    return [manifest.full_name, *([source, source.partition("@")[0]] if source else [])]


def unknown_model(name: str, served: list[str]) -> RequestError:
    """The error for a name that is not served."""
    return RequestError(
        f"model: no model {name[:100]!r} is served; available: {', '.join(served)}",
        "model",
        "unknown_model",
    )
