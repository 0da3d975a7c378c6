"""Routes that change the served models; they exist only on a server with admin keys (access.py)."""

import logging
import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Body, FastAPI, Path
from fastapi.exceptions import RequestValidationError
from pydantic import Field, model_validator

from de3.model_store.manifest import NAME
from de3.runtime import fields
from de3.runtime.errors import RequestError
from de3.runtime.fields import JsonObject
from de3.server.http.openapi import error
from de3.server.manager import Change
from de3.server.models import Role
from de3.server.service import Service
from de3.server.shared_run import SharedRun

Name = Annotated[str, Path(pattern=f"^{NAME.pattern}$", description="name of a model, without a version")]
NameOrVersion = Annotated[
    str, Path(pattern=f"^{NAME.pattern}(:[0-9]{{1,9}})?$", description="name of a model, or name:version")
]
CHANGE = re.compile(r"POST /v1/models/[^/]+/(load|unload|rollback|audit/reset|learn)")  # the routes below

log = logging.getLogger("de3")
Version = Annotated[int, Field(ge=1, le=10**9)]


class Load(JsonObject):
    """The body of a request to load a model."""

    version: Version | None = Field(default=None, description="default: the newest in the store")
    role: Role = Field(
        default="current",
        description="current: answers requests that do not name a version; canary: answers a share of these; shadow: "
        "runs copies of them for comparison; loaded: answers only requests that name its version",
    )
    share: float | None = Field(default=None, gt=0, lt=1, description="share of the requests, for a canary")

    @model_validator(mode="after")
    def _fits(self) -> "Load":
        if (self.share is None) == (self.role == "canary"):
            raise ValueError("share: required for a canary, and not allowed for other roles")
        return self


class Unload(JsonObject):
    """The body of a request to unload a model."""

    version: Version | None = Field(default=None, description="default: all versions of the name")


def add_routes(app: FastAPI, service: Service, dependencies: Sequence[Any]) -> None:
    """Add the routes to an application. dependencies: FastAPI dependencies of each route."""

    async def changed(change: Change) -> dict[str, Any]:  # runs to its end even if the client disconnects
        return await SharedRun[dict[str, Any]]("model_change").result(lambda: service.shared.change(change))

    errors: dict[int | str, dict[str, Any]] = {
        400: error(400, "the body is not JSON"),
        401: error(401, "an API key is needed; send Authorization: Bearer KEY"),
        403: error(403, "this needs an admin's key"),
        404: error(404, "no version '3' of model 'sst2'; available: 1, 2", "name"),
        409: error(409, "sst2 is the only model that is served", "name"),
        422: error(422, "not loaded; the served models are unchanged: layer_02.onnx: damaged", "name"),
    }
    common: dict[str, Any] = {"tags": ["change models"], "responses": errors, "dependencies": dependencies}

    @app.post("/v1/models/{name}/load", **common)
    async def load_model(name: Name, what: Annotated[Load, Body()] = Load()) -> dict[str, Any]:  # noqa: B008
        """Load and warm up a version, then give it its role. Loading a served version reloads it from the store.

        A version that becomes current is pinned: later starts serve it, too. Without `version`, the pin is lifted.
        """
        return await changed(Change("load", name, what.version, what.role, what.share or 0.0, True))

    @app.post("/v1/models/{name}/rollback", **common)
    async def roll_back_model(name: Name) -> dict[str, Any]:
        """Make the previously current version current again, and pin it."""
        return await changed(Change("rollback", name, by_admin=True))

    @app.post("/v1/models/{name}/unload", **common)
    async def unload_model(name: Name, what: Annotated[Unload, Body()] = Unload()) -> dict[str, Any]:  # noqa: B008
        """Stop serving a version, or all versions of a name."""
        return await changed(Change("unload", name, what.version))

    @app.post("/v1/models/{name}/audit/reset", **common)
    async def reset_audit(name: NameOrVersion) -> dict[str, Any]:
        """Discard the audit results; with a guarantee, requests without exit options run to full depth at first."""
        served = service.current(name)
        return {"model": served.model.full_name, "tau": await service.audits.reset(served)}

    @app.post("/v1/models/{name}/learn", **common)
    async def start_fit(name: Name) -> dict[str, Any]:
        """Fit exits to the records of live traffic now, on a server that learns."""
        return {"object": "learn"} | await service.audits.learning(service.current(name), starts=True)


def log_change(admin: str, route: str, body: bytes, request_id: str) -> None:
    """Log a request of an admin, before it is answered. route: method and path.

    Only requests to the routes above: the body of another may have texts, which are not logged.
    """
    if CHANGE.fullmatch(route):
        sent = f"{route} {body[:200].decode(errors='replace')}".strip()
        log.info("admin %s sends %s, request id %s", admin, sent, request_id)


def explain(wrong: RequestValidationError) -> RequestError:
    """The first validation error of a request to these routes, as a RequestError."""
    first = wrong.errors()[0]
    if first["type"] == "json_invalid":
        return RequestError("the body is not JSON", cause="not_json")
    no_object = f"the body must be a JSON object, sent as application/json: {first['msg']}"
    return fields.explain(first, first["loc"][1:], no_object)
