"""POST /classify: read, parse, submit, wait, answer. Nothing in here knows layers; the engine does.

Plain ASGI: a web framework's routing and request objects would cost as much as an encoder layer.
"""

import asyncio
import logging
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from model_store.model import Model
from server import protocol
from server.access import BYTES_PER_TEXT, TOKENS_PER_TEXT
from server.engine import DeadlineError, LeadError
from server.errors import ApiError
from server.exchange import HEADER, Exchange, request_id
from server.models import Served
from server.protocol import ClassifyRequest
from server.queue import QueueFullError
from server.rules import Choice
from server.service import Service
from server.shadow import run_beside
from server.work import Item, Job

log = logging.getLogger("de3")


async def classify(scope: Scope, receive: Receive, send: Send, service: Service) -> None:
    """Answer one request; every outcome is counted."""
    x = Exchange(request_id(scope), scope, scope.get("de3.started") or perf_counter())
    metrics = service.metrics
    answer: tuple[bytes, str] | None = None
    service.in_flight += 1
    try:
        answer = await _answer(x, receive, service)
        x.status = 200
    except ApiError as error:
        x.status, x.cause = error.status, error.cause
        await error.response(x.id)(scope, receive, send)
    except ClientDisconnect:  # nobody reads an answer
        x.status, x.cause = 499, "client_gone"
    except Exception:
        log.exception("request %s failed", x.id)
        x.cause = "internal"
        failure = ApiError(500, "internal error; the server's log has the details")
        await failure.response(x.id)(scope, receive, send)
    finally:
        service.in_flight -= 1
        x.ended = perf_counter()
        if x.cause is not None:
            metrics.rejected.labels(x.cause).inc()
        metrics.requests.labels(x.model, str(x.status)).inc()
        if x.status in (200, 504):  # refusals are quick, and would make the rest look so
            metrics.request_latency.labels(x.model).observe(x.ended - x.started)
    if answer is not None:  # no longer in flight: a client that reads slowly takes no one's place
        await _send(send, x.id, *answer)
    service.report(x)
    if x.job is not None:
        x.job.release()


async def _answer(x: Exchange, receive: Receive, service: Service) -> tuple[bytes, str]:
    """The answer's body and timing; raises ApiError or ClientDisconnect."""
    service.check_open()
    x.owner = service.access.user(x.scope)
    settings = service.settings
    body = await read_body(x.scope, receive, settings.max_body_bytes, settings.body_timeout_s)
    client = service.client(x.scope, x.owner)
    charge = service.access.charge(x.owner)
    if len(body) > BYTES_PER_TEXT:
        charge.raise_to(-(-len(body) // BYTES_PER_TEXT))
    try:
        if len(body) <= protocol.LARGE_BODY_BYTES:
            parsed = protocol.parse(body, settings.max_texts)
        else:
            parsed = await _parse_in_turn(body, client, x, service)
    except ApiError:
        charge.settle(1)
        raise
    charge.raise_to(len(parsed.input))
    served = service.models.get(parsed.model)
    x.model = served.model.full_name
    choice = service.choose(served, parsed)
    future = asyncio.get_running_loop().create_future()
    x.job = job = Job(
        served.model,
        choice.rule,
        parsed.truncate,
        parsed.explain,
        parsed.ood,
        parsed.input,
        served.timing.predict,
        future,
        served.together_s,
        served.timing.layer_s,
        served.timing.predict_first_exit,
        choice.budget_s,
        parsed.best_effort,
        served.watch,
        client=client,
        piece_s=served.timing.piece_s,
    )
    try:
        with service.holding(job, client):
            await _run(job, x.scope, service, x.started + settings.timeout_s)
    finally:  # also of a request that failed, as far as it came
        charge.settle(sum(-(-len(item.tokens) // TOKENS_PER_TEXT) for item in job.items if item.tokens))
    shadow = service.models.shadow_of(served)
    if shadow is not None:
        run_beside(shadow, job, parsed, service)
    service.metrics.answered(job, choice)
    body = protocol.answer(
        x.id,
        x.model,
        [_row(item, job, served.model) for item in job.items],
        sum(item.outcome.tokens for item in job.items if item.outcome),
        _about(choice, served, parsed.explain),
    )
    return body, _timing(job, x.started, perf_counter())


async def _parse_in_turn(body: bytes, client: str, x: Exchange, service: Service) -> ClassifyRequest:
    """The request in a large body; raises ApiError, or ClientDisconnect if its client leaves meanwhile."""
    timeout_s, connection = service.settings.timeout_s, x.scope.get("de3.connection")
    task = asyncio.current_task()
    assert task is not None
    if connection is not None:
        connection.on_gone = task.cancel  # its body must not wait on
    try:
        async with asyncio.timeout(x.started + timeout_s - perf_counter()), service.lane.turn(client):
            return protocol.parse(body, service.settings.max_texts)
    except TimeoutError:
        raise _too_late(timeout_s) from None
    except asyncio.CancelledError:
        if connection is None or not connection.is_gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        if connection is not None:
            connection.on_gone = None


def _too_late(timeout_s: float) -> ApiError:
    return ApiError(504, f"no answer within {timeout_s:g} s", cause="timeout")


async def read_body(scope: Scope, receive: Receive, limit: int, timeout_s: float) -> bytes:
    """A request's body; raises ApiError 413 as soon as it is too large, 408 when it does not come."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes, the most allowed", cause="too_large")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise too_large
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(timeout_s):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > limit:
                    raise too_large
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", cause="slow_body") from None
    return b"".join(chunks)


def _refused(job: Job, needed_s: float) -> ApiError:
    """The answer to a budget that cannot be kept, not even at the first exits; it would take `needed_s`."""
    assert job.budget_s is not None and job.deadline is not None
    reply_s = job.submitted + job.budget_s - job.deadline
    return ApiError(
        503,
        f"latency_budget_ms: {1000 * job.budget_s:g} ms cannot be kept, the first exit would take about "
        f"{1000 * (needed_s + reply_s):.1f} ms now; allow more, or set best_effort",
        "latency_budget_ms",
        "budget",
        retry_after=1,
    )


def _about(choice: Choice, served: Served, explain: bool) -> dict[str, Any]:
    """What an answer says of the request as a whole: the promise it asked for, and how τ was chosen."""
    found: dict[str, Any] = {}
    certificate = served.rules.certificate(choice)
    if certificate is not None:
        found["certificate"] = certificate
    if explain:
        found["tau_choice"] = choice.row()
    return found


async def _run(job: Job, scope: Scope, service: Service, until: float) -> None:
    """Let the engine run a job; raises ApiError when there is no room, an item fails or its time is up (504),
    ClientDisconnect when its client is gone."""
    future, connection = job.future, scope.get("de3.connection")

    def give_up(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    try:
        service.engine.submit(job)
    except QueueFullError:  # it is closed: the server stops
        raise ApiError(503, "the server stops", cause="queue_full", retry_after=1) from None
    except DeadlineError as error:
        raise _refused(job, error.args[0]) from None
    except LeadError:
        raise ApiError(
            429,
            "latency_budget_ms: you have had more than your share of the engine, and others wait; "
            "try again, or without a budget",
            "latency_budget_ms",
            "over_share",
            retry_after=1,
        ) from None
    late = _too_late(service.settings.timeout_s)
    timer = future.get_loop().call_later(until - perf_counter(), give_up, late)
    if connection is not None:
        connection.on_gone = lambda: give_up(ClientDisconnect())
    try:
        await future
    except BaseException:
        # What waits leaves the queue at once, and what runs stops at its next layer.
        service.engine.drop(job)
        raise
    finally:
        timer.cancel()
        if connection is not None:
            connection.on_gone = None


async def _send(send: Send, request_id: str, body: bytes, timing: str) -> None:
    """Send an answer."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"server-timing", timing.encode()),
        (HEADER, request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _row(item: Item, job: Job, model: Model) -> dict[str, Any]:
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
            "tau": item.rule.tau,
            "lambda": job.rule.signal.lam,
            **protocol.reading_row(o.reading),
        },
    }
    if o.truncated:
        row["truncated"] = True
    if job.ood and job.watch is not None:
        row["ood_score"] = job.watch.score(o.passed)
    if o.is_far:
        row["out_of_distribution"] = True
    if job.explain:
        row["layers"] = [
            {"layer": m, **protocol.reading_row(r), "label": labels[r.label], "probs": r.probs}
            for m, r in o.passed
        ]
    return row


def _timing(job: Job, started: float, ended: float) -> str:
    """Server-Timing in ms: tokenize and model are sums over the texts, queue is the longest wait."""
    outcomes = [item.outcome for item in job.items if item.outcome]
    queue = max([o.queue_s for o in outcomes])
    tokenize = sum([o.tokenize_s for o in outcomes])
    model = sum([o.model_s for o in outcomes])
    return (
        f"read;dur={1000 * (job.submitted - started):.3f}, queue;dur={1000 * queue:.3f}, "
        f"tokenize;dur={1000 * tokenize:.3f}, model;dur={1000 * model:.3f}, "
        f"total;dur={1000 * (ended - started):.3f}"
    )
