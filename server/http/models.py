"""Routes that report the served models, their calibrations, and their audit results."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from de3.exits.bound import CONFIDENCE
from de3.exits.kinds import Spans
from de3.exits.signals import signals_of
from de3.model_store.manifest import Manifest
from de3.runtime.errors import RequestError
from de3.server.audit.auditor import Auditor
from de3.server.http import openapi
from de3.server.http.access import Access
from de3.server.service import Service
from de3.server.shared_run import SharedRun


def add_routes(app: FastAPI, service: Service, dependencies: Sequence[Any], access: Access) -> None:
    """Add the routes to an application. dependencies: FastAPI dependencies of each route."""
    reporting: WeakKeyDictionary[Auditor, dict[str | None, SharedRun[dict[str, Any]]]] = WeakKeyDictionary()
    calibrations: dict[str, tuple[Manifest, bytes]] = {}  # only the last one requested, as each takes 170 KB

    @app.get(
        "/v1/models",
        tags=["models"],
        dependencies=dependencies,
        responses=openapi.answer("ModelList", "The served models"),
    )
    async def models() -> dict[str, Any]:
        """The served models: labels, layers, role, defaults, and the calibrated accuracy of the defaults."""
        stored = await asyncio.to_thread(service.stored)
        rows = [model_row(m) | service.role(m) | stored.get(m.full_name, {}) for m in service.manifests()]
        named = [_named(row) for row in rows]
        return {"object": "list", "data": rows, "models": named}

    @app.get(
        "/v1/models/{name}",
        tags=["models"],
        dependencies=dependencies,
        responses=openapi.answer("ServedModel", "The served model") | {404: {"description": "no such model"}},
    )
    async def model(name: str) -> dict[str, Any]:
        """One served model, as /v1/models lists it."""
        manifest, stored = service.manifest(name), await asyncio.to_thread(service.stored)
        return model_row(manifest) | service.role(manifest) | stored.get(manifest.full_name, {})

    @app.get(
        "/v1/models/{name}/calibration",
        tags=["models"],
        dependencies=dependencies,
        responses={404: {"description": "no such model, or it has no calibration"}},
    )
    async def calibration(name: str) -> Response:
        """Accuracy, speed-up and disagreement of each signal and τ on held-out samples."""
        manifest = service.manifest(name)
        full_name = manifest.full_name
        if manifest.calibration is None:
            message = f"{full_name} was exported without a calibration"
            raise RequestError(message, "name", "unknown_model")
        kept = calibrations.get(full_name)
        if kept is None or kept[0] is not manifest:  # the same version may have been reloaded
            body = {"object": "calibration", "model": full_name, "confidence": CONFIDENCE}
            body |= manifest.calibration.model_dump(by_alias=True)
            if manifest.missed is not None:
                body["missed"] = manifest.missed.model_dump()
            calibrations.clear()
            kept = calibrations[full_name] = (manifest, orjson.dumps(body))
        return Response(kept[1], media_type="application/json")

    @app.get(
        "/v1/models/{name}/audit",
        tags=["models"],
        dependencies=dependencies,
        responses={404: {"description": "no such model"}, 409: {"description": "audits are off"}},
    )
    async def audit(name: str, request: Request) -> dict[str, Any]:
        """Disagreement of early answers with full depth at each τ, measured on live traffic.

        A user's key sees the results of its own name, and an admin's key those of the name with the most texts, and the
        state of all.
        """
        served = service.current(name)
        reader = access.reader(request.scope) if service.settings.has_guarantee else None
        runs = reporting.setdefault(service.audits.of(served), {})
        running = runs.setdefault(reader, SharedRun("report"))
        return {"object": "audit"} | await running.result(lambda: service.audits.report(served, reader))

    @app.get(
        "/v1/models/{name}/learn",
        tags=["models"],
        dependencies=dependencies,
        responses={404: {"description": "no such model"}, 409: {"description": "the server does not learn"}},
    )
    async def learn(name: str) -> dict[str, Any]:
        """The exits that the server learns from live traffic: records, fits, and the next step."""
        return {"object": "learn"} | await service.audits.learning(service.current(name))


def _named(row: Mapping[str, Any]) -> dict[str, str]:
    """A model as System One's clients list it."""
    layers, labels = row["num_layers"], ", ".join(row["labels"])
    released = datetime.fromtimestamp(row["created"], UTC).date().isoformat()
    return {"name": row["id"], "description": f"{labels} ({layers} layers)", "release_date": released}


def model_row(manifest: Manifest) -> dict[str, Any]:
    """One model as /v1/models lists it."""
    c = manifest.calibration
    return {
        "id": manifest.full_name,
        "object": "model",
        "created": manifest.created,
        "owned_by": "de3",
        "name": manifest.name,
        "version": manifest.version,
        "labels": manifest.labels,
        "num_layers": manifest.num_layers,
        "exit_layers": manifest.exit_layers,
        "has_upstream": manifest.upstream is not None,
        "source": manifest.source,
        "max_tokens": manifest.max_tokens,
        "input": manifest.input,
        "thresholds": manifest.thresholds,
        "tolerance": manifest.tolerance,
        "aggregation": manifest.aggregation,
        "span_labels": kind.rule.names if isinstance(kind := manifest.kind, Spans) else None,
        "precision": manifest.precision,
        "defaults": manifest.defaults.model_dump(by_alias=True) | {"signal": manifest.default_signal.name},
        "signals": [s.name for s in signals_of(manifest.traits)] if len(manifest.exit_layers) > 1 else [],
        "self_labelled": c is not None and c.self_labelled,
        "learned": None if manifest.learned is None else manifest.learned.model_dump(exclude={"base"}),
        "has_original": c is not None and c.original_disagreement is not None,
        "calibration": c.default.model_dump(by_alias=True) if c else None,
    }
