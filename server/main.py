"""Runs the server in one process, and drains it on SIGTERM."""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType

import uvicorn

from de3.model_store.store import Artifact
from de3.server import logs
from de3.server.http.app import PROTOCOLS, create_app
from de3.server.http.asgi import handler
from de3.server.http.connection import Connection
from de3.server.http.frontend import Frontend
from de3.server.http.listener import Listener
from de3.server.http.protocol import Protocol
from de3.server.service import EngineError, Service
from de3.server.settings import Settings

log = logging.getLogger("de3")
BACKLOG = 512  # connections that the kernel queues until they are accepted
ACCEPTS = 16  # connections accepted in one iteration of the event loop
# File descriptors reserved for models, logs, the event loop, and connections accepted in one batch before others are
# evicted for them.
OTHER_FILES = 192
MAX_CONNECTIONS = 10_000


class HttpServer(uvicorn.Server):
    """A uvicorn server that accepts many connections at once, and starts to drain on SIGTERM or SIGINT."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen.

        libuv accepts one connection per iteration of the event loop, which is too few when iterations are long, so each
        socket is watched ACCEPTS times.
        """
        await super().startup(sockets)
        loop, config = asyncio.get_running_loop(), self.config
        create: Callable[..., asyncio.Protocol] = config.http_protocol_class
        protocol = partial(
            create, config=config, server_state=self.server_state, app_state=self.lifespan.state
        )
        for listening in [s for server in self.servers for s in server.sockets]:
            for _ in range(ACCEPTS - 1):
                again = socket.socket(fileno=os.dup(listening.fileno()))
                self.servers.append(await loop.create_server(protocol, sock=again, backlog=BACKLOG))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, then stop."""
        self._service.drain()
        super().handle_exit(sig, frame)


def uvicorn_config(
    service: Service, on_failure: Callable[[], None], protocols: Mapping[str, Protocol] = PROTOCOLS
) -> uvicorn.Config:
    """uvicorn's configuration for a service; on_failure is called if its models cannot load or its engine fails."""
    settings, frontend = service.settings, Frontend(service, protocols)
    app = create_app(frontend, on_failure)
    most = settings.max_connections or max_connections()
    listener = Listener(frontend, most, settings.max_body_bytes, settings.body_timeout_s)
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
    """Maximum number of connections: the process's limit on open files minus OTHER_FILES, at most MAX_CONNECTIONS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # the system may have a lower limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, soft - OTHER_FILES))


def _check_address(host: str, port: int) -> None:
    """Raise ValueError if the server cannot listen on an address; called before models are loaded."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                one = socket.socket(family, kind)
            except OSError:  # a family that this machine lacks, which the server leaves out, too
                continue
            with one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
    except OSError as error:
        hint = "; stop the other process, or give another --port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None


def serve(settings: Settings, warnings: Sequence[str] = (), artifacts: Sequence[Artifact] = ()) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted requests and return. Logs the warnings first.

    artifacts: served in addition to the models of the store that the settings name.

    Raises StoreError if a model is missing or damaged, and ValueError if a setting cannot be met.
    """
    # An engine thread takes the GIL a dozen times per text, and waits up to this long each time while the event loop is
    # busy. With Python's default of 5 ms the waits would add up to 60 ms.
    sys.setswitchinterval(0.0005)
    logs.configure(settings.log_format)
    for warning in warnings:
        log.warning(warning)
    _check_address(settings.host, settings.port)
    service = Service(settings, artifacts)

    def stop() -> None:
        server.should_exit = True

    server = HttpServer(uvicorn_config(service, stop), service)
    # uvicorn raises these signals again after it has shut down. With these handlers, a drained server exits with 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())
    server.run()
    if isinstance(service.failure, EngineError):  # logged already
        sys.exit(1)
    if service.failure is not None:
        raise service.failure
