"""A real server in a thread, on a real socket; the test can pause its engine."""

import asyncio
import hashlib
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import wraps
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, ClassVar, ParamSpec
from urllib.parse import urlsplit

import httpx
import jsonschema
import orjson
import pytest

from de3.model_store.store import Artifact
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.prove import Prover
from de3.server import manager
from de3.server.http.app import PROTOCOLS
from de3.server.http.http_server import HttpServer, uvicorn_config
from de3.server.http.listener import BODY, Listener
from de3.server.http.protocol import Protocol
from de3.server.service import Service
from de3.server.settings import Settings

P = ParamSpec("P")
RESERVED: list[socket.socket] = []
CERTIFICATES = ssl.create_default_context()  # httpx would load them for each request, which is slow


def until(condition: Callable[[], Any], what: str, seconds: float = 180) -> None:
    """Poll until a condition holds; fails the test if that takes too long. what: for the message."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.002)


@contextmanager
def waiting_client(url: str, **body: Any) -> Iterator[None]:
    """A client that has sent a request to /classify, and leaves at the end."""
    with closing(HTTPConnection(urlsplit(url).netloc)) as connection:
        connection.request("POST", "/classify", orjson.dumps(body))
        yield


def in_event_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Make a test of a coroutine function, which runs in an event loop of its own."""

    @wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return run


def free_port() -> int:
    """A port on which nothing listens, and which no other test gets, whatever process it runs in.

    The port is below the range from which the kernel assigns ports. Until this process ends, a socket that does not
    listen stays bound to the port, so this function never returns it again; servers can still listen on it, because
    they bind with SO_REUSEADDR.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        reserved = socket.socket()
        with suppress(OSError):
            reserved.bind(("127.0.0.1", port))
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            RESERVED.append(reserved)
            return port
        reserved.close()


class ProvesOnce(Prover):
    """Proves the same files only once in this process, for all servers: a proof takes a second of CPU time."""

    _proved: ClassVar[dict[tuple[str, ...], str]] = {}

    def prove(self, artifact: Artifact, runtime: str) -> str:
        manifest = artifact.manifest
        files = (hashlib.sha256((artifact.path / name).read_bytes()).hexdigest() for name in manifest.files)
        key = (runtime, manifest.model_dump_json(exclude={"version"}), *files)
        if key not in self._proved:
            self._proved[key] = super().prove(artifact, runtime)
        return self._proved[key]


manager.Prover = ProvesOnce  # type: ignore[misc]


class Server:
    """A server in a thread of this process, so that tests can inspect its parts."""

    def __init__(self, service: Service, protocols: Mapping[str, Protocol] = PROTOCOLS) -> None:
        self.service = service
        config = uvicorn_config(service, lambda: None, protocols)
        self.listener: Listener = config.http.args[0]  # type: ignore[union-attr]
        self.frontend: Any = self.listener.frontend
        self._uvicorn = HttpServer(config, service)
        self._thread = threading.Thread(target=self._uvicorn.run)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self._uvicorn.started, "the port")
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def change(self, patch: pytest.MonkeyPatch, **settings: Any) -> None:
        """Change settings of the running server, such as a time limit that is too short for the rest of a test."""
        patch.setattr(self.service, "settings", self.service.settings.model_copy(update=settings))

    def bodies_awaited(self) -> int:
        """Number of connections whose request head has arrived, but not yet the whole body."""
        return sum(c.state == BODY for c in list(self.listener.connections))

    def classify(self, **body: Any) -> httpx.Response:
        return httpx.post(self.url + "/classify", json=body, timeout=60, verify=CERTIFICATES)

    def described(self, **body: Any) -> dict[str, Any]:
        """The answer to a request; fails the test if it violates the schema, or has a field that the schema lacks."""
        answer: dict[str, Any] = self.classify(**body).json()
        schema = httpx.get(self.url + "/openapi.json").json()
        for one in schema["components"]["schemas"].values():
            one["additionalProperties"] = False
        kind = "ClassifySeveralResponse" if "models" in body else "ClassifyResponse"
        schema["$ref"] = f"#/components/schemas/{kind}"
        jsonschema.validate(answer, schema)
        return answer

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        return sum(
            sample.value
            for family in self.service.metrics.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def serving(store: Path, **settings: Any) -> Iterator[Server]:
    """A server over a store, once it is ready.

    If the store has the model tiny and `models` is not set, tiny is the default model.
    """
    if "models" not in settings and (store / "tiny").exists():
        settings.setdefault("default_model", "tiny")
    with running(Service(Settings(store=store, port=0, **settings))) as server:
        yield server


@contextmanager
def running(service: Service) -> Iterator[Server]:
    """A server of this service, once it is ready."""
    server = Server(service)
    server.start()
    try:
        until(lambda: server.service.state != "loading", "readiness")
        assert server.service.state == "ready", "see the log"
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """A server of both models, shared by the tests of a file."""
    with serving(store, models=["tiny", "tiny-int8"], threads=2) as running:
        yield running


class Gate:
    """Blocks every engine thread before it takes its next items, until opened, for at most 60 s."""

    def __init__(self, monkeypatch: Any) -> None:
        self._open = threading.Event()
        take = WorkQueue.next

        def gated(queue: WorkQueue, *arguments: Any) -> Any:
            self._open.wait(60)
            return take(queue, *arguments)

        monkeypatch.setattr(WorkQueue, "next", gated)

    def open(self) -> None:
        self._open.set()


@contextmanager
def process(store: Path, *arguments: str, code: str = "") -> Iterator[subprocess.Popen[str]]:
    """`de3 serve` as a user runs it, on a port chosen by the system, in one process unless DE3_PROCESSES is set.

    If the store has the model tiny and there is no --model, tiny is the default model. code: Python code to run instead
    of `de3`, with the same arguments. The process is killed at the end.
    """
    if (store / "tiny").exists() and "--model" not in arguments:
        arguments = (*arguments, "--default-model", "tiny")
    program = ["-c", code] if code else ["-m", "de3.cli"]
    command = [sys.executable, *program, "serve", "--store", str(store), *arguments]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={"DE3_PROCESSES": "1", **os.environ, "DE3_PORT": "0"}
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def url_when_ready(running: subprocess.Popen[str]) -> str:
    """The server's URL, once the log reports that the server is ready.

    If the log ends before that, returns the URL seen so far, or "". The rest of the log is read in the background.
    """
    url, ready = "", False
    assert running.stderr is not None
    for line in running.stderr:
        found = re.search(r"running on (http://[0-9.:]+)", line)
        url = found[1] if found else url
        ready = ready or "ready in" in line
        if url and ready:
            break
    threading.Thread(target=running.stderr.read, daemon=True).start()
    return url


@pytest.fixture
def hangup() -> Iterator[None]:
    """The default effect of SIGHUP on the test's processes, also if pytest runs under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
