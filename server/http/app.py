"""The HTTP application: checks, protocols and the other routes."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from ipaddress import IPv4Address, IPv6Address, ip_address

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from de3.runtime.errors import Cause, RequestError
from de3.server.http import (
    admin,
    detectors,
    gliner,
    guardrail,
    hugging_face,
    kserve,
    models,
    open_inference,
    openapi,
    rerank,
    score,
    tei,
)
from de3.server.http.access import OPEN
from de3.server.http.classify import CLASSIFY
from de3.server.http.decisions import DECISIONS, SYSTEMONE
from de3.server.http.endpoint import answer, read_body
from de3.server.http.exchange import HEADER, request_id
from de3.server.http.frontend import Frontend, route_path
from de3.server.http.moderations import MODERATIONS
from de3.server.http.page import page
from de3.server.http.protocol import Protocol
from de3.server.shared_run import SharedRun

# Errors on other paths have the format of the last protocol listed here with the same first path segment.
PROTOCOLS: dict[str, Protocol] = {
    "/rerank": rerank.TEI_OR_JINA,
    "/v1/rerank": rerank.JINA,
    "/v2/rerank": rerank.JINA,
    "/score": score.SCORE,
    "/v1/score": score.SCORE,
    "/v1/models/{model}:predict": kserve.PREDICT,
    "/api/v1/text/contents": detectors.CONTENTS,
    "/beta/litellm_basic_guardrail_api": guardrail.GUARDRAIL,
    "/v1/extract": gliner.EXTRACT,
    "/v1/decisions": DECISIONS,
    "/v1/systemone": SYSTEMONE,
    "/classify": CLASSIFY,
    "/v1/classify": CLASSIFY,
    "/v1/moderations": MODERATIONS,
    "/": hugging_face.TEXT_CLASSIFICATION,
    "/predict": tei.PREDICT,
    "/v2/models/{model}/infer": open_inference.INFER,
    "/v2/models/{model}/versions/{version}/infer": open_inference.INFER,
}
READ_METHODS = ("GET", "HEAD", "OPTIONS")
# The documentation page has inline scripts and styles, and loads nothing from other origins.
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
        b"img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    ),
]


def create_app(frontend: Frontend, on_failure: Callable[[], None] = lambda: None) -> ASGIApp:
    """The ASGI application of a service; on_failure is called if its models cannot be loaded or its engine fails."""
    service = frontend.service
    settings, api = service.settings, create_api(frontend, on_failure)
    origins = settings.cors_origins
    # With API keys neither check is needed: a foreign web page has no key, unless its user entered one.
    has_keys = frontend.access.users is not None
    checks_origin = not has_keys and "*" not in origins
    checks_host = not has_keys and "*" not in settings.allowed_hosts and _is_loopback(settings.host)
    is_own_name = lru_cache(256)(partial(_is_own_name, frozenset(map(str.lower, settings.allowed_hosts))))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await api(scope, receive, send)
        elif checks_host and not is_own_name(_host_of(scope)):
            await frontend.refuse(OTHER_HOST, scope)(scope, receive, _with_headers(send, request_id(scope)))
        elif checks_origin and scope["method"] not in READ_METHODS and not _same_origin(scope, origins):
            await frontend.refuse(OTHER_ORIGIN, scope)(scope, receive, _with_headers(send, request_id(scope)))
        elif (route := frontend.route(scope)) is not None:
            if frontend.sheds(scope):
                await frontend.shed(scope, send, route)
            else:
                await answer(scope, receive, send, frontend, route)
        else:
            identity = request_id(scope)
            send = _with_headers(send, identity)
            try:
                path = route_path(scope)
                if not OPEN.fullmatch(path):
                    await service.wait_until_open()
                if admin_name := frontend.access.check(path, scope):
                    body = await read_body(scope, receive, settings.max_body_bytes)
                    admin.log_change(admin_name, f"{scope['method']} {path}", body, identity)
                    receive = _replay(body, receive)
                await api(scope, receive, send)
            except RequestError as error:
                await frontend.refuse(error, scope)(scope, receive, send)
            except ClientDisconnect:  # no client is left to read a response
                service.metrics.rejected.labels("client_gone").inc()
            except asyncio.CancelledError:  # the client disconnected
                service.metrics.rejected.labels("client_gone").inc()
                raise

    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
        expose_headers=["Retry-After", "Server-Timing", "X-Request-ID"],
    )


OTHER_ORIGIN = RequestError(
    "Origin: pages of this origin may not send requests; the server's operator can allow it with --cors-origin",
    "Origin",
    "other_origin",
)

OTHER_HOST = RequestError(
    "Host: this server answers requests to localhost or an address; for another name, such as that of a proxy, its "
    "operator can allow it with --allowed-host",
    "Host",
    "other_origin",
)


def _is_loopback(host: str) -> bool:
    """True if all addresses of a host are loopback addresses. A name is resolved, as for listening."""
    try:
        found = [ip_address(row[4][0]) for row in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        return False
    return all((getattr(ip, "ipv4_mapped", None) or ip).is_loopback for ip in found)


def _host_of(scope: Scope) -> bytes:
    """The Host header, from the scope if a Connection stored it there; empty if there is none."""
    host = scope.get("de3.host")
    return host if host is not None else next((v for name, v in scope["headers"] if name == b"host"), b"")


_HOST = re.compile(r"(?:\[(?P<ipv6>[\d:.a-f]+)\]|(?P<name>[\w.-]+))(?::\d*)?", re.ASCII | re.IGNORECASE)


def _is_own_name(allowed: Collection[str], header: bytes) -> bool:
    """True for an address, localhost or an allowed name; any other name may be an attempt at DNS rebinding.

    allowed: names in lower case. header: the Host header; empty if an HTTP/1.0 request has none.
    """
    parts = _HOST.fullmatch(header.decode("latin-1") or "localhost")
    if parts is None:
        return False
    name = (parts["name"] or "").lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost") or name in allowed:
        return True
    try:
        return bool(IPv6Address(parts["ipv6"]) if parts["ipv6"] else IPv4Address(name))
    except ValueError:
        return False


def _same_origin(scope: Scope, allowed: Sequence[str]) -> bool:
    """True unless the request was sent by a web page of another origin that is not in `allowed`.

    Browsers send the origin of the page; other clients need not send one.
    """
    origin = host = None
    for name, value in scope["headers"]:
        if name == b"origin":
            origin = value.decode("latin-1")
        elif name == b"host":
            host = value.decode("latin-1")
    return origin is None or origin in allowed or origin.partition("://")[2] == host


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body already read, then further messages."""
    read: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return read.pop() if read else await receive()

    return again


def _with_headers(send: Send, identity: str) -> Send:
    """A `send` that adds the request id and the security headers to a response."""
    extra = [(HEADER, identity.encode()), *SECURITY_HEADERS]

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            own = {name for name, _ in headers}  # the page has its own content security policy
            message["headers"] = headers + [header for header in extra if header[0] not in own]
        await send(message)

    return with_headers


def create_api(frontend: Frontend, on_failure: Callable[[], None]) -> FastAPI:
    """The application with every route; it has the protocols' routes only to document them."""
    service = frontend.service

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(service.load(on_failure))
        yield
        loading.cancel()
        await asyncio.to_thread(service.stop)
        await asyncio.to_thread(frontend.stop)

    # Swagger UI from this package, not from a CDN: /docs works without internet access.
    app = FastAPIOffline(
        title="DE3",
        version=version("de3"),
        summary="Text classification that exits early",
        description=openapi.DESCRIPTION,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would trust the Host header
        swagger_ui_parameters={"tryItOutEnabled": True},
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,  # function names in generated clients
    )
    app.state.service = service
    scraping = SharedRun[bytes]("metrics")  # several scrapes at a time would hold the GIL for too long
    # For the documentation and its Authorize button; access.py checks keys.
    bearer = [Depends(HTTPBearer(auto_error=False))]
    users = bearer if frontend.access.users is not None else []

    @app.post("/classify", tags=["classify"], dependencies=users, **openapi.CLASSIFY)
    async def classify() -> Response:
        """Classify a text, a pair of texts or a batch; each text exits at the first layer whose score is below tau."""
        raise HTTPException(404)  # for paths such as /classify%0A: create_app answers /classify itself

    for path, protocol in frontend.protocols.items():
        if path != "/classify":
            app.post(path, dependencies=users, **openapi.protocol_route(path, protocol))(classify)
    models.add_routes(app, service, users, frontend.access)
    open_inference.add_routes(app, service, dependencies=users)
    tei.add_routes(app, service, dependencies=users)
    if frontend.access.admins is not None:
        admin.add_routes(app, service, bearer)

    @app.head("/", include_in_schema=False)
    @app.get("/", tags=["operation"], response_class=HTMLResponse)
    async def get_page() -> HTMLResponse:
        """The page, which shows each layer at work."""
        return page()

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["operation"])
    async def health() -> dict[str, str]:
        """200 while the process is running."""
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", tags=["operation"], responses={503: {"description": "loading, or draining"}})
    async def ready() -> JSONResponse:
        """200 from when every model is loaded and warmed up until the server drains; otherwise 503."""
        status = await service.status()
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", tags=["operation"], response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus's text format."""
        body = await scraping.result(service.shared.scrape)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    _add_error_handlers(app, frontend)
    openapi.document(app)
    return app


def _methods(app: FastAPI, scope: Scope) -> set[str]:
    """The methods that are allowed on a request's path, according to the first template that matches it."""
    found = [
        route for route in app.routes if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE
    ]
    return {method for route in found if route.path == found[0].path for method in route.methods or ()}


def _add_error_handlers(app: FastAPI, frontend: Frontend) -> None:
    """Answer every error through the frontend, which counts it."""
    causes: dict[int, Cause] = {400: "not_json", 404: "unknown_path", 405: "wrong_method"}

    @app.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> Response:
        return frontend.refuse(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def wrong_value(request: Request, error: RequestValidationError) -> Response:
        return frontend.refuse(admin.explain(error), request.scope)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path[:100]
        message = {
            404: f"no such path: {path}; see /docs",
            405: f"{request.method} is not allowed on {path}; see /docs",
        }.get(error.status_code, str(error.detail))
        is_off = frontend.access.admins is None and admin.CHANGE.fullmatch(
            f"{request.method} {route_path(request.scope)}"
        )
        if is_off:
            message = f"{path} needs a server with --admin-keys-file"
        cause = causes.get(error.status_code, "bad_request")
        response = frontend.refuse(RequestError(message, cause=cause), request.scope)
        response.headers.update(error.headers or {})
        if error.status_code == 405:  # the framework knows only the first route of a path
            response.headers["allow"] = ", ".join(sorted(_methods(app, request.scope)))
        return response

    @app.exception_handler(Exception)
    async def crash(request: Request, _: Exception) -> Response:
        error = RequestError("internal error; the server's log has the details", cause="internal")
        return frontend.refuse(error, request.scope)
