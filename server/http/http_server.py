"""The HTTP server of one process: uvicorn, with our own HTTP/1.1 protocol class and limits."""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn

from de3.model_store.manifest import Manifest
from de3.runtime.background import report_unhandled, run_once
from de3.server.http.app import PROTOCOLS, create_app
from de3.server.http.asgi import handler
from de3.server.http.connection import Connection
from de3.server.http.frontend import Frontend
from de3.server.http.listener import Listener
from de3.server.http.protocol import Protocol
from de3.server.service import Service

log = logging.getLogger("de3")
BACKLOG = 512  # connections that the kernel queues until they are accepted
ACCEPTS = 16  # connections accepted in one iteration of the event loop
# File descriptors reserved for models, logs, the event loop, and connections that are accepted in one batch before
# others are evicted.
OTHER_FILES = 192
MAX_CONNECTIONS = 10_000


class HttpServer(uvicorn.Server):
    """A uvicorn server that drains before it stops, and accepts several connections per event loop iteration."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stop_at = inf  # end of the drain period (monotonic seconds)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening.

        libuv accepts one connection per socket in each iteration of the event loop, which is too few when iterations
        are long. So each socket is duplicated, and the event loop watches ACCEPTS copies.
        """
        loop = asyncio.get_running_loop()
        report_unhandled(loop)
        await super().startup(sockets)
        for listening in [s for server in self.servers for s in server.sockets]:
            for _ in range(ACCEPTS - 1):
                again = socket.socket(fileno=os.dup(listening.fileno()))
                self.servers.append(await loop.create_server(self.connect, sock=again, backlog=BACKLOG))
        if self.servers:
            run_once("hint", self._give_hint(url_of(self.servers[0].sockets[0])))

    async def _give_hint(self, url: str) -> None:
        """Once the server is ready, log how to use it."""
        service = self._service
        await service.end_of_loading.wait()
        if service.state == "ready":
            manifests = service.manifests()
            say_ready(hint(url, manifests, service.models.default, service.settings.has_keys))

    def connect(self) -> asyncio.Protocol:
        """The protocol of a new connection; called once the server has started."""
        create: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return create(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain, and stop after drain_s; stop at once if this is the second signal or models are loading."""
        was_ready = self._service.state == "ready"
        self._service.drain()
        if was_ready:
            self._stop_at = monotonic() + self._service.settings.drain_s
            if self.servers:  # not a worker of a supervisor
                say_draining(self._service.settings.drain_s)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second; returns True if the server must stop."""
        self.should_exit |= monotonic() >= self._stop_at
        return await super().on_tick(counter)


def say_ready(hint: str) -> None:
    """Log how to use the server, and tell systemd that it is ready."""
    log.info(hint)
    _tell_systemd("READY=1")


def say_draining(seconds: float) -> None:
    """Log that the server drains, and tell systemd that it stops."""
    log.info("draining for %g s, then stopping; a second signal stops the server at once", seconds)
    _tell_systemd("STOPPING=1")


def _tell_systemd(state: str) -> None:
    """Send a state to systemd, if it runs this server as a service of type notify (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
            to.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def stop_signals() -> list[signal.Signals]:
    """The signals on which a server drains and stops; without SIGHUP under nohup."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignores_hangup else [signal.SIGHUP])]


def url_of(listening: socket.socket) -> str:
    """The URL of a server, given one of its sockets; with the loopback address if it listens on all addresses."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hint(url: str, manifests: Sequence[Manifest], default: str | None, has_keys: bool) -> str:
    """Where a server's page is, and a command that classifies a text.

    manifests: those of the served models. default: name of the default model; None if there is none.
    """
    manifest = next((one for one in manifests if one.name == default), manifests[0])
    is_pair, names = manifest.input == "pair", {one.name for one in manifests}
    body: dict[str, Any] = {} if len(names) == 1 or default in names else {"model": manifest.name}
    body["input"] = {"text": "A film.", "text_pair": "A wonderful film."} if is_pair else "A wonderful film."
    key = ' -H "Authorization: Bearer $DE3_API_KEY"' if has_keys else ""
    return f"open {url} in a browser, or try: curl {url}/classify{key} -d '{json.dumps(body)}'"


def uvicorn_config(
    service: Service,
    on_failure: Callable[[], None],
    protocols: Mapping[str, Protocol] = PROTOCOLS,
    on_closed: Callable[[], None] = lambda: None,
) -> uvicorn.Config:
    """uvicorn's configuration for a service; raises ValueError for a setting that cannot be met.

    on_failure: called if the models cannot be loaded or the engine fails. protocols: protocols by path. on_closed:
    called for each closed connection.
    """
    settings, frontend = service.settings, Frontend(service, protocols)
    app = create_app(frontend, on_failure)
    most = settings.max_connections or max_connections()
    listener = Listener(frontend, settings, most, on_closed)
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        backlog=BACKLOG,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # http/clients.py reads them
        # By then every accepted request has finished or timed out.
        timeout_graceful_shutdown=int(settings.timeout_s) + 5,
        http=partial(Connection, listener, handler(app)),  # type: ignore[arg-type]  # a factory
        ws="none",  # upgrades are not supported: such a request is answered like any other
    )


def max_connections() -> int:
    """Maximum number of connections: the limit on open files minus OTHER_FILES, at most MAX_CONNECTIONS.

    The process's limit on open files is first raised as far as the system permits.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # the system may have a lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))
