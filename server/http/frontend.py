"""Access control, limits and reporting for all HTTP requests."""

from collections.abc import Mapping
from time import perf_counter

from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope, Send

from de3.runtime.errors import RequestError
from de3.runtime.fair_queue import Slots
from de3.runtime.shares import Shares
from de3.server.http import errors
from de3.server.http.access import Access
from de3.server.http.clients import Clients
from de3.server.http.exchange import HEADER, Exchange, Reporter, request_id
from de3.server.http.protocol import Protocol, Route
from de3.server.http.request_log import RequestLog
from de3.server.http.traces import Traces, provider
from de3.server.service import Service


class Frontend:
    """Admits, sheds, refuses and reports the requests to a service.

    Attributes:
        protocols: protocols by path.
        bytes_in_flight: shares of the body bytes in flight.
        parsing: the slot in which one large body at a time is parsed, for at most half of the event loop's time.
    """

    def __init__(self, service: Service, protocols: Mapping[str, Protocol]) -> None:
        """protocols: protocols by path. Raises ValueError for a setting that cannot be met, such as invalid keys."""
        settings = service.settings
        self.service, self.protocols = service, protocols
        self._routes = {
            path: Route(path, protocol, {}) for path, protocol in protocols.items() if "{" not in path
        }
        self._templates = [
            (compile_path(path)[0], path, protocol) for path, protocol in protocols.items() if "{" in path
        ]
        self._by_first_part = {
            part: protocol
            for path, protocol in protocols.items()
            for part in (path.split("/")[1], *protocol.others)
        }
        self.access = Access(settings, service.shared.leases)
        self._clients = Clients(settings.trusted_proxies)
        self.bytes_in_flight = Shares(settings.max_inflight_bytes, "bytes")
        self.parsing = Slots(1, pauses=True)
        self._reporters: list[Reporter] = []
        if settings.log_requests or settings.log_texts:
            self._reporters.append(RequestLog(settings.log_format, settings.log_texts))
        self._traces = Traces(provider()) if settings.traces else None
        if self._traces is not None:
            self._reporters.append(self._traces)
        objective = f"overloaded: the latency objective of {settings.slo_p99_ms or 0:g} ms cannot be met"
        self._shed_error = RequestError(objective, cause="shed", retry_after_s=1)
        # Built once for each protocol, as an overloaded server sends little else.
        self._shed_responses: dict[Protocol, Response] = {
            protocol: errors.response(self._shed_error, None, protocol.error(self._shed_error))
            for protocol in protocols.values()
        }
        self._shed_counter = service.metrics.rejected.labels("shed")
        self._shed_status = str(errors.STATUSES["shed"])

    def route(self, scope: Scope) -> Route | None:
        """The route of a classification request; None for other requests. The scope keeps it."""
        if "de3.route" not in scope:
            scope["de3.route"] = self._find_route(scope)
        route: Route | None = scope["de3.route"]
        return route

    def _find_route(self, scope: Scope) -> Route | None:
        if scope["method"] != "POST":
            return None
        path = route_path(scope)
        if (route := self._routes.get(path)) is not None:
            return route
        for pattern, template, protocol in self._templates:
            if (match := pattern.match(path)) is not None:
                return Route(template, protocol, match.groupdict())
        return None

    def admit(self, scope: Scope) -> str | None:
        """The client of a request; None if no body is needed to answer it.

        Raises RequestError for a request that is refused whatever its body contains.
        """
        if self.route(scope) is None:
            needs_body = self.access.check(route_path(scope), scope)
            return self.client(scope, "") if needs_body else None
        if self.sheds(scope):
            raise self._shed_error
        if not self.service.is_open and self.service.settings.processes < 2:
            self.service.check_open()  # of several processes, another one may be ready
        scope["de3.owner"] = owner = self.access.user(scope)
        scope["de3.client"] = client = self.client(scope, owner)
        return client

    def sender(self, scope: Scope) -> tuple[str, str]:
        """The owner of a classification request's key, and its client; see Access.user and client().

        Raises RequestError if a key is needed and is missing or unknown.
        """
        if "de3.client" in scope:  # admitted
            return scope["de3.owner"], scope["de3.client"]
        owner = self.access.user(scope)
        return owner, self.client(scope, owner)

    def client(self, scope: Scope, owner: str) -> str:
        """Fair-share key of a request: the owner of its API key, or else the client's address or IPv6 network.

        owner: empty if the request has no key.
        """
        return f"key {owner}" if owner else self._clients.name(scope)

    def address(self, peer: tuple[str, int] | None) -> str:
        """The address, or the IPv6 network, of a connection's peer; empty if it has no address."""
        return self._clients.name({"client": peer, "headers": []})

    def sheds(self, scope: Scope) -> bool:
        """True if a classification request must be shed to meet the latency objective."""
        if self.service.settings.slo_p99_ms is None:
            return False

        def client() -> str | None:
            try:
                return self.client(scope, self.access.user(scope))
            except RequestError:
                return None

        return self.service.admission.sheds(client)

    async def shed(self, scope: Scope, send: Send, route: Route) -> None:
        """Count a request that is shed, send its response, and report it."""
        self._shed_counter.inc()
        self.service.metrics.requests.add(1, "none", self._shed_status)
        response = self._shed_responses[route.protocol]
        exchange = Exchange(
            request_id(scope), scope, route.template, status=response.status_code, cause="shed"
        )
        headers = [*response.raw_headers, (HEADER, exchange.id.encode())]
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})
        exchange.ended = exchange.started
        self.report(exchange)

    def refuse(self, error: RequestError, scope: Scope) -> Response:
        """Count a refused or failed request; returns the response, in the error format of the path's protocol.

        Not for the requests that endpoint.py answers: endpoint.py counts those itself.
        """
        self.service.metrics.rejected.labels(error.cause).inc()
        if (route := self.route(scope)) is not None:
            protocol: Protocol | None = route.protocol
        else:
            protocol = self._by_first_part.get(route_path(scope)[1:].partition("/")[0])
        return errors.response(error, content=None if protocol is None else protocol.error(error))

    def malformed(self) -> None:
        """Count a request that is not HTTP."""
        self.service.metrics.rejected.labels("malformed").inc()

    def abandoned(self, scope: Scope) -> None:
        """Count a request whose client left before its handler started; report it if it is a classification request."""
        route, ended = self.route(scope), perf_counter()
        if route is None:
            self.service.metrics.rejected.labels("client_gone").inc()
            return
        exchange = Exchange(request_id(scope), scope, route.template, scope["de3.started"], ended)
        exchange.fail("client_gone")
        latency_s = ended - exchange.started
        self.service.metrics.responded(exchange.models, exchange.status, exchange.cause, latency_s)
        self.report(exchange)

    def dropped(self, reason: str) -> None:
        """Count a connection that was closed to enforce a limit. reason: the limit, as a metric label."""
        self.service.metrics.dropped_connections.labels(reason).inc()

    def report(self, exchange: Exchange) -> None:
        """Log and trace a finished request, as configured."""
        for reporter in self._reporters:
            reporter(exchange)

    def stop(self) -> None:
        """Send the last traces."""
        if self._traces is not None:
            self._traces.stop()


def route_path(scope: Scope) -> str:
    """The path without the prefix under which a proxy or Ray serves this application."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))
