"""Runs the server, in one process or several, and drains it on SIGTERM, SIGINT or SIGHUP."""

import errno
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact, Store
from de3.runtime.flags import Wanted
from de3.runtime.processes import number_of_processes
from de3.runtime.rules import flag_setting
from de3.server import memory
from de3.server.http.http_server import HttpServer, stop_signals, uvicorn_config
from de3.server.http.traces import check_can_trace
from de3.server.learn.learners import check_can_fit
from de3.server.models import aliases, find
from de3.server.processes.supervisor import ServerError, Supervisor
from de3.server.questions import read_questions
from de3.server.service import EngineError, Service
from de3.server.settings import Settings


def _bind(host: str, port: int) -> list[socket.socket]:
    """Bind a TCP socket to each address of a host; raises ValueError if an address cannot be bound.

    Called once the settings are checked, so that a wrong one is reported whatever uses the port, but before models are
    loaded, so that an unusable address fails at once. With port 0, all sockets get the same free port.
    """
    bound: list[socket.socket] = []
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            try:
                one = socket.socket(family, kind)
            except OSError:  # an address family that this machine lacks
                continue
            bound.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            port = port or bound[0].getsockname()[1]  # port 0: use the first socket's port
            one.bind((address[0], port, *address[2:]))
    except OSError as error:
        for one in bound:
            one.close()
        hint = "; stop the other process, or give another --port" if error.errno == errno.EADDRINUSE else ""
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}{hint}") from None
    return bound


def serve(settings: Settings, artifacts: Sequence[Artifact] = ()) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then answer the accepted requests and return. The log must be configured.

    artifacts: served in addition to the models of the store that the settings name.

    Raises StoreError if a model is missing or damaged, and ValueError if a setting cannot be met. Ends the process with
    exit code 1 if the engine fails, or if the server's processes fail repeatedly.
    """
    # An engine thread takes the GIL a dozen times per text, and waits up to this long each time while the event loop is
    # busy. With Python's default of 5 ms the waits would add up to 60 ms.
    sys.setswitchinterval(0.0005)
    memory.keep_large_blocks_apart()
    for of in settings.upstreams:
        if (
            of.upstream.timeout_s >= settings.timeout_s
        ):  # calls would end with their request, never as failures
            raise ValueError(
                f"{of.name}: upstream.timeout_s ({of.upstream.timeout_s:g}) must be below --timeout-s "
                f"({settings.timeout_s:g})"
            )
    found = find(Store(settings.store, settings.state_dir), settings.models, artifacts)
    _check_questions(settings, [artifact.manifest for artifact in found])
    processes = number_of_processes(settings, found)
    settings = settings.model_copy(update={"processes": processes})
    if settings.traces:
        check_can_trace()
    with ExitStack() as stack:
        if settings.learn:
            check_can_fit()
            if settings.state_dir is None:  # learned versions need a folder, at least until the server ends
                folder = stack.enter_context(TemporaryDirectory(prefix="de3-learn-"))
                settings = settings.model_copy(update={"state_dir": Path(folder)})
        _serve(settings, artifacts)


def _check_questions(settings: Settings, manifests: Sequence[Manifest]) -> None:
    """Raise ValueError for a file of questions that the served models cannot answer."""
    if settings.questions is None:
        return
    known = dict[str, tuple[Manifest, Wanted | None]]()
    for manifest in manifests:
        for name in (manifest.name, *aliases(manifest)):
            known.setdefault(name, (manifest, flag_setting(manifest, settings)))
    known |= {alias: known[name] for alias, name in settings.targets.items() if name in known}
    try:
        read_questions(settings.questions).check(known)
    except ValueError as error:
        raise ValueError(f"questions: {error}") from None


def _serve(settings: Settings, artifacts: Sequence[Artifact]) -> None:
    if settings.processes > 1:
        supervisor = Supervisor(settings, artifacts)
        try:
            uvloop.run(supervisor.run(_bind(settings.host, settings.port)))
        except ServerError:  # already logged
            sys.exit(1)
        return
    service = Service(settings, artifacts)

    def stop() -> None:
        server.should_exit = True

    server = HttpServer(uvicorn_config(service, stop), service)
    for one in _bind(settings.host, settings.port):  # uvicorn binds its own sockets
        one.close()
    # uvicorn raises these signals again after it has shut down. With these handlers, a drained server exits with 0.
    for number in stop_signals():
        signal.signal(number, server.handle_exit)
    server.run()
    if isinstance(service.failure, EngineError):  # already logged
        sys.exit(1)
    if service.failure is not None:
        raise service.failure
