"""POST /classify: read, parse, submit, wait, answer. Nothing in here knows layers; the engine does."""

import asyncio
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from exits.rule import ExitRule
from model_store.model import Model
from server import protocol
from server.errors import ApiError
from server.protocol import ClassifyRequest
from server.queue import QueueFullError
from server.service import Service
from server.work import Item, Job

GONE = Response(status_code=499)  # nobody reads it


async def classify(request: Request, service: Service) -> Response:
    """Answer one request; every outcome is counted."""
    started = perf_counter()
    metrics = service.metrics
    name, response = "none", None
    service.in_flight += 1
    try:
        parsed = await _read(request, service)
        model = service.models.get(parsed.model)
        name = model.full_name
        response = await _answer(request, service, parsed, model, started)
    except ApiError as error:
        metrics.rejected.labels(error.cause).inc()
        response = error.response()
    except ClientDisconnect:
        metrics.rejected.labels("client_gone").inc()
        response = GONE
    finally:
        service.in_flight -= 1
        # No response: a failure of ours, which the app logs and answers with 500.
        metrics.requests.labels(name, str(response.status_code if response else 500)).inc()
        metrics.request_latency.labels(name).observe(perf_counter() - started)
    return response


async def _read(request: Request, service: Service) -> ClassifyRequest:
    """The request, checked in itself; raises ApiError."""
    service.check_open()
    settings = service.settings
    body = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
    return protocol.parse(body, settings.max_texts)


async def _answer(
    request: Request, service: Service, parsed: ClassifyRequest, model: Model, started: float
) -> Response:
    """Submit a request's texts, wait for them, and answer; raises ApiError or ClientDisconnect."""
    rule = exit_rule(parsed, model)
    future = asyncio.get_running_loop().create_future()
    job = Job(model, rule, parsed.truncate, parsed.input, future)
    try:
        service.engine.submit(job)
    except QueueFullError:
        raise service.overloaded() from None
    await _wait(request, service, job, started + service.settings.timeout_s)
    body = protocol.answer(
        model.full_name,
        [_row(item, job, model, parsed.explain) for item in job.items],
        sum(item.outcome.tokens for item in job.items if item.outcome),
    )
    timing = _timing(job, started, perf_counter())
    return Response(body, headers={"Server-Timing": timing}, media_type="application/json")


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """A request's body; raises ApiError 413 as soon as it is too large, 408 when it does not come."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes, the most allowed", cause="too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", cause="slow_body") from None
    return b"".join(chunks)


def exit_rule(request: ClassifyRequest, model: Model) -> ExitRule:
    """The rule that a request asks for, the model's defaults filled in; raises ApiError 422."""
    defaults, exits = model.manifest.defaults, model.manifest.exit_layers
    if request.max_layer is not None and not exits[0] <= request.max_layer <= exits[-1]:
        raise ApiError(
            422, f"max_layer: must be from {exits[0]} to {exits[-1]}, got {request.max_layer}", "max_layer"
        )
    return ExitRule(
        tau=defaults.tau if request.tau is None else request.tau,
        lam=defaults.lam if request.lam is None else request.lam,
        max_layer=request.max_layer,
    )


async def _wait(request: Request, service: Service, job: Job, until: float) -> None:
    """Wait for a job's end; drop it when its time is up (ApiError 504) or its client has gone."""
    gone = asyncio.ensure_future(request.receive())  # after the body, all that can come is a disconnect
    try:
        await asyncio.wait(
            (job.future, gone), timeout=until - perf_counter(), return_when=asyncio.FIRST_COMPLETED
        )
        if job.future.done():
            job.future.result()  # raises the error of an item that failed
        elif gone.done():
            raise ClientDisconnect
        else:
            raise ApiError(504, f"no answer within {service.settings.timeout_s:g} s", cause="timeout")
    finally:
        # Also when one of its items failed: the others leave the queue at once.
        service.engine.drop(job)
        job.future.cancel()
        gone.cancel()


def _row(item: Item, job: Job, model: Model, explain: bool) -> dict[str, Any]:
    """An item's answer."""
    o, labels = item.outcome, model.manifest.labels
    assert o is not None  # the job is done
    row: dict[str, Any] = {
        "index": item.index,
        "label": labels[o.reading.label],
        "probs": o.reading.probs,
        "num_classes": len(labels),
        "exit": {
            "layer": o.layer,
            "num_layers": model.manifest.num_layers,
            "reason": o.reason,
            "tau": job.rule.tau,
            "lambda": job.rule.lam,
            **protocol.reading_row(o.reading),
        },
    }
    if o.truncated:
        row["truncated"] = True
    if explain:
        row["layers"] = [
            {"layer": m, **protocol.reading_row(r), "label": labels[r.label], "probs": r.probs}
            for m, r in o.passed
        ]
    return row


def _timing(job: Job, started: float, ended: float) -> str:
    """Server-Timing in ms: tokenize and model are sums over the texts, queue is the longest wait."""
    outcomes = [item.outcome for item in job.items if item.outcome]
    stages = {
        "read": job.submitted - started,
        "queue": max(o.queue_s for o in outcomes),
        "tokenize": sum(o.tokenize_s for o in outcomes),
        "model": sum(o.model_s for o in outcomes),
        "total": ended - started,
    }
    return ", ".join(f"{name};dur={1000 * seconds:.3f}" for name, seconds in stages.items())
