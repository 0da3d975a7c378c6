"""Classification requests of all protocols: read, parse, infer, serialize.

Plain ASGI: a web framework's routing and request objects would cost as much as an encoder layer.
"""

import asyncio
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from de3.runtime.background import failures
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Request, Sender
from de3.runtime.errors import RequestError
from de3.runtime.fields import LARGE_BODY_BYTES
from de3.server.http import compression, errors
from de3.server.http.access import BYTES_PER_TEXT, TOKENS_PER_TEXT, Charge
from de3.server.http.asgi import AsgiRequest
from de3.server.http.exchange import HEADER, Exchange, request_id
from de3.server.http.frontend import Frontend
from de3.server.http.listener import BODY_TIMEOUT_S
from de3.server.http.protocol import Call, Protocol, Route
from de3.server.infer import Inference, timed_out

Header = tuple[bytes, bytes]


async def answer(scope: Scope, receive: Receive, send: Send, frontend: Frontend, route: Route) -> None:
    """Answer one classification request; every outcome is counted, and logged and traced as configured."""
    exchange = Exchange(request_id(scope), scope, route.template, scope.get("de3.started") or perf_counter())
    try:
        body, headers = await _answer(exchange, receive, send, frontend, route)
        # The request is no longer in flight, so a slow reader does not hold a share.
        if body:
            await _send(send, exchange.id, body, headers)
    finally:
        frontend.report(exchange)
        if exchange.inference is not None:
            exchange.inference.release()


async def _answer(
    exchange: Exchange, receive: Receive, send: Send, frontend: Frontend, route: Route
) -> tuple[bytes, list[Header]]:
    """Run a request, count its outcome, and send the response if it is an error.

    Returns the body and the headers of a successful response, which the caller sends; otherwise the body is empty.
    """
    service, protocol, body, headers = frontend.service, route.protocol, b"", list[Header]()
    failure: RequestError | None = None
    service.in_flight += 1
    try:
        job = await _classify(exchange, receive, frontend, route)
        if not job.request.says_unread:
            for outcome in (outcome for part in job.parts for outcome in part.outcomes()):
                job.request.check(outcome)
        body = protocol.serialize(exchange.id, job)
        timing, cut = _timing(job, exchange.started, perf_counter())
        headers = [(b"server-timing", timing)]
        if cut:
            headers.append((b"de3-truncated", cut))
            service.metrics.truncated(job, route.template)
        exchange.status = 200
    except RequestError as error:
        # The traceback would keep this frame and the parsed body in memory until the next garbage collection.
        failure = error.with_traceback(None)
    except ClientDisconnect:  # no client is left to read a response
        exchange.fail("client_gone")
    except asyncio.CancelledError:  # the client disconnected (connection.py)
        exchange.fail("client_gone")
        raise
    except Exception:
        failures.exception("request %s failed", exchange.id)
        failure = RequestError("internal error; the server's log has the details", cause="internal")
    finally:
        service.in_flight -= 1
        if failure is not None:
            exchange.fail(failure.cause)
        exchange.ended = perf_counter()
        latency_s = exchange.ended - exchange.started
        service.metrics.responded(exchange.models, exchange.status, exchange.cause, latency_s)
    if failure is not None:
        response = errors.response(failure, exchange.id, protocol.error(failure))
        await response(exchange.scope, receive, send)
    return body, headers


async def _classify(exchange: Exchange, receive: Receive, frontend: Frontend, route: Route) -> Job:
    """Read, parse and run a request; returns the finished job.

    Raises RequestError if it cannot be answered, and ClientDisconnect if the client is gone.
    """
    service, scope, protocol = frontend.service, exchange.scope, route.protocol
    if not service.is_open:
        await service.wait_until_open()
        service.check_open()
    exchange.owner, client = frontend.sender(scope)
    settings = service.settings
    body = await read_body(scope, receive, settings.max_body_bytes)
    if body[:1] in compression.FIRST:
        body = compression.decompressed(body, settings.max_body_bytes)
    charge = Charge(frontend.access.limit, exchange.owner)
    if len(body) > BYTES_PER_TEXT:
        await charge.raise_to(-(-len(body) // BYTES_PER_TEXT))
    call = Call(body, route.path, scope["headers"], settings.max_texts, service.questions)
    try:
        if len(body) <= LARGE_BODY_BYTES:
            request = protocol.parse(call)
        else:
            request = await _parse_in_turn(call, client, exchange, frontend, protocol)
    except RequestError:
        await charge.raise_to(1)
        raise
    await charge.raise_to(max(1, request.weight))
    sender = Sender(client, exchange.owner, exchange.started + settings.timeout_s)
    exchange.inference = inference = Inference(request, sender)
    try:
        return await inference.run(service)
    finally:  # a failed request is also charged for the texts that ran
        if charge.limit is not None and inference.job is not None:
            items = inference.job.items
            charge.settle(sum(-(-item.num_tokens // TOKENS_PER_TEXT) * len(item.heads) for item in items))


async def _parse_in_turn(
    call: Call, client: str, exchange: Exchange, frontend: Frontend, protocol: Protocol
) -> Request:
    """Parse a large body when its turn comes; raises RequestError if it is invalid or the request times out."""
    left_s = exchange.started + frontend.service.settings.timeout_s - perf_counter()
    try:
        async with asyncio.timeout(left_s), frontend.parsing.hold(client):
            return protocol.parse(call)
    except TimeoutError:
        raise timed_out(frontend.service) from None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body of a request.

    Raises RequestError if it is too large or too slow, and ClientDisconnect if the client is gone.
    """
    if "de3.connection" in scope:  # Connection delivers a complete body, within these limits
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return bytes(message["body"])
    too_large = RequestError(f"the body is larger than the limit of {limit} bytes", cause="too_large")
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and (len(value) > 18 or int(value) > limit):
            raise too_large
    chunks: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
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
        reason = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise RequestError(reason, cause="slow_body") from None
    return b"".join(chunks)


def _timing(job: Job, started: float, ended: float) -> tuple[bytes, bytes]:
    """The values of Server-Timing and, for protocols that have no place for them, the indices of truncated texts.

    Times are in ms: tokenize and model are sums over the texts, queue and upstream the maximum.
    """
    queue = tokenize = model = upstream = 0.0
    cut = set[int]()
    for item in job.items:
        if (outcome := item.heads[0].outcome) is not None:
            queue = max(queue, outcome.queue_s)
            tokenize += outcome.tokenize_s
            model += outcome.model_s
            upstream = max(upstream, outcome.upstream_s)
            if outcome.truncated:
                cut.add(item.index)
    waited = f"upstream;dur={1000 * upstream:.3f}, " if upstream else ""
    timing = (
        f"read;dur={1000 * (job.submitted - started):.3f}, queue;dur={1000 * queue:.3f}, "
        f"tokenize;dur={1000 * tokenize:.3f}, model;dur={1000 * model:.3f}, "
        f"{waited}total;dur={1000 * (ended - started):.3f}"
    )
    return timing.encode(), ",".join(map(str, sorted(cut))).encode()


async def _send(send: Send, request_id: str, body: bytes, more: list[Header]) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *more,
        (HEADER, request_id.encode()),
    ]
    request = getattr(send, "__self__", None)
    if isinstance(request, AsgiRequest):  # no middleware in between
        request.respond(200, headers, body)
        return
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
