"""The server in adverse conditions: loading, overload, timeouts, clients that disconnect, and shutdown."""

import json
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPResponse
from importlib.metadata import PackageNotFoundError
from math import inf
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import httpx
import pytest

from de3.loadtest.client import post
from de3.model_store.store import Store
from de3.model_store.tokenizer import TextTokenizer
from de3.server import manager
from de3.server.http import connection
from de3.server.http.http_server import ACCEPTS, stop_signals
from de3.server.processes.supervisor import Supervisor
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import CERTIFICATES, Gate, Server, process, serving, until, url_when_ready


class Panic(BaseException):
    """An error like the panics of Rust libraries, which do not derive from Exception."""


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny"], threads=1, max_texts=1024) as running:
        yield running


def test_a_full_queue_is_503_and_loses_nothing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with (
        serving(store, models=["tiny"], threads=1, max_queue=4, max_texts=4) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        accepted = [pool.submit(server.classify, input=["good"] * 2) for _ in range(2)]
        until(lambda: len(server.service.engine.queue) == 4, "the queue to fill")
        refused = server.classify(input="one more")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert "4 texts are in flight; at most 4 are allowed" in refused.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200
        gate.open()
        assert [f.result().status_code for f in accepted] == [200, 200]
        assert server.classify(input="one more").status_code == 200
        assert server.metric("de3_rejected_total", cause="queue_full") == 1


def test_a_request_without_an_answer_in_time_is_504(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, models=["tiny"], threads=1) as server:
        with monkeypatch.context() as patch:
            server.change(patch, timeout_s=0.5)
            late = server.classify(input=["good", "bad"])
        assert late.status_code == 504 and int(late.headers["retry-after"]) >= 1
        assert "no answer within 0.5 s" in late.json()["error"]["message"]
        assert len(server.service.engine.queue) == 0  # the texts of the request have left the queue
        gate.open()
        assert server.classify(input="good", model="tiny").status_code == 200
        assert server.metric("de3_exit_layer_count", model="tiny:1") == 1  # those texts never ran


def test_a_text_whose_client_leaves_stops_at_a_layer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from de3.model_store.segments import OnnxLayers

    entered, go_on, ran = Event(), Event(), []
    run = OnnxLayers.run

    def slow(layers: OnnxLayers, layer: int, hidden: Any) -> object:
        ran.append(layer)
        if layer == 1:
            entered.set()
            go_on.wait(20)
        return run(layers, layer, hidden)

    assert server.classify(input="good").status_code == 200  # warms up the engine thread
    monkeypatch.setattr(OnnxLayers, "run", slow)
    before = server.metric("de3_rejected_total", cause="client_gone")
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(post({"input": "good", "tau": 0}))
        assert entered.wait(20)
    until(lambda: server.metric("de3_rejected_total", cause="client_gone") > before, "the departure")
    go_on.set()
    monkeypatch.undo()
    assert server.classify(input="good").status_code == 200
    assert ran == [1]


def test_a_crash_is_500_and_the_server_goes_on(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise Panic("division")

    before = server.metric("de3_requests_total", model="tiny:1", status="500")
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "encode", crash)
        broken = server.classify(input=["good", "bad"])
    assert broken.status_code == 500
    assert server.metric("de3_requests_total", model="tiny:1", status="500") == before + 1
    assert broken.json()["error"]["type"] == "InternalServerError"
    assert "division" not in broken.text
    assert server.classify(input="good").status_code == 200


def test_one_bad_text_frees_the_room_of_its_request(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, entered, go_on = TextTokenizer.encode, Event(), Event()

    def slow(tokenizer: TextTokenizer, texts: list, **options: bool) -> object:
        if texts[0][0] == "wait":
            entered.set()
            go_on.wait(20)
        return encode(tokenizer, texts, **options)

    with serving(store, threads=2, models=["tiny"]) as server, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(TextTokenizer, "encode", slow)
        other = pool.submit(server.classify, input="wait")
        assert entered.wait(20)
        entered.clear()
        # The other request occupies one thread; the second thread fails at the first of these texts.
        failed = server.classify(input=["good " * 80] + ["wait"] * 50, truncate=False)
        assert failed.status_code == 422 and failed.json()["error"]["param"] == "input[0]"
        until(lambda: len(server.service.engine.queue) == 0, "the room to be free")
        go_on.set()
        assert other.result().status_code == 200


@contextmanager
def loading(store: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[tuple[Server, Event]]:
    """A server that loads its models once the event is set."""
    go_on, load = Event(), manager.load
    monkeypatch.setattr(manager, "load", lambda *a: (go_on.wait(60), load(*a))[1])
    server = Server(Service(Settings(store=store, port=0, models=["tiny"], **settings)))
    if settings:
        monkeypatch.setattr(server.service.shared, "others_ready", mock.AsyncMock(return_value=True))
    server.start()
    try:
        yield server, go_on
    finally:
        go_on.set()
        server.stop()


def ready(server: Server) -> tuple[int, dict[str, str]]:
    answer = httpx.get(server.url + "/ready")
    return answer.status_code, answer.json()


def test_a_server_says_that_it_is_loading_ready_or_draining(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loading(store, monkeypatch) as (server, go_on):
        assert httpx.get(server.url + "/health").status_code == 200
        assert ready(server) == (503, {"status": "loading"})
        early = server.classify(input="good")
        assert early.status_code == 503 and "loading" in early.json()["error"]["message"]
        assert early.headers["retry-after"] == "1"
        go_on.set()
        until(lambda: ready(server)[0] == 200, "readiness")
        server.service.drain()
        assert ready(server) == (503, {"status": "draining"})
        assert server.metric("de3_ready") == 0
        assert server.classify(input="good").status_code == 200


def test_requests_wait_for_the_models_while_another_process_is_ready(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loading(store, monkeypatch, processes=2) as (server, go_on), ThreadPoolExecutor(2) as pool:
        for path in ("/ready", "/v2/health/ready"):
            assert httpx.get(server.url + path).status_code == 200
        with monkeypatch.context() as patch:
            server.change(patch, timeout_s=0.01)
            assert "loading" in server.classify(input="good").text  # it has waited for timeout_s
        waiting = [
            pool.submit(server.classify, input="good " * 1000),
            pool.submit(httpx.get, server.url + "/v2/models/tiny"),
        ]
        until(lambda: len(server.listener.connections) == 2, "the requests")
        assert not any(one.done() for one in waiting)
        go_on.set()
        assert [one.result().status_code for one in waiting] == [200, 200]


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of `de3` with these arguments, in this process."""
    from de3.cli import main

    monkeypatch.setattr(sys, "argv", ["de3", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


def test_demo_serves_the_demo_model_whatever_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[Settings] = []
    monkeypatch.setattr("de3.server.main.serve", lambda settings, *_: served.append(settings))
    monkeypatch.setenv("DE3_STORE", str(tmp_path))
    assert exit_code(monkeypatch, "serve", "--demo", "--port", "8001") == 0
    (settings,) = served
    artifact = Store(settings.store).open(settings.models[0])
    assert artifact.full_name == "sst2:1" and settings.port == 8001


def version_without_otel(name: str) -> str:
    raise PackageNotFoundError(name)


DRAINS_FIRST = """
import sys, threading
from de3.cli import main
from de3.server.engine.queue import WorkQueue
from de3.server.service import Service
draining, drain, take = threading.Event(), Service.drain, WorkQueue.next
Service.drain = lambda service: (drain(service), draining.set())
WorkQueue.next = lambda *arguments: (draining.wait(60), take(*arguments))[1]
sys.argv = ["de3", *sys.argv[1:]]
main()
"""


def test_sigterm_answers_everything_that_was_accepted(store: Path) -> None:
    with process(store, "--model", "tiny", code=DRAINS_FIRST) as running, ThreadPoolExecutor(4) as pool:
        url = url_when_ready(running)
        answers = [
            pool.submit(httpx.post, url + "/classify", json={"input": ["good"] * 8}, verify=CERTIFICATES)
            for _ in range(4)
        ]
        busy = "de3_in_flight_requests 4.0"
        until(lambda: busy in httpx.get(url + "/metrics", verify=CERTIFICATES).text, "four requests")
        running.send_signal(signal.SIGTERM)
        assert [len(answer.result().json()["data"]) for answer in answers] == [8] * 4
        assert running.wait(30) == 0


@contextmanager
def draining(store: Path, processes: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """The URL of a server, a function that signals to it, and one that waits for its end."""
    if processes == 1:
        with serving(store, models=["tiny"], drain_s=600) as server:
            yield server.url, partial(server._uvicorn.handle_exit, signal.SIGTERM, None), server._thread.join
    else:
        options = ("--model", "tiny", "--drain-s", "600", "--processes", str(processes))
        with process(store, *options) as running:
            yield (
                url_when_ready(running),
                partial(running.send_signal, signal.SIGHUP),
                partial(running.wait, 60),
            )
            assert running.returncode == 0


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_draining_server_answers_until_the_second_signal(
    store: Path, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with draining(store, processes) as (url, send, wait):
            assert systemd.recv(100) == b"READY=1"
            with httpx.Client(base_url=url, verify=CERTIFICATES) as idle:
                assert "connection" not in idle.get("/ready").headers
                send()
                until(lambda: httpx.get(url + "/ready", verify=CERTIFICATES).status_code == 503, "the drain")
                assert systemd.recv(100) == b"STOPPING=1"
                for client in (idle, httpx):  # the first reuses its connection
                    answer = client.post(url + "/classify", json={"input": "good"})  # type: ignore[attr-defined]
                    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
            send()
            wait()


def test_nohup_is_respected() -> None:
    stops = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == stops[:2]
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert stop_signals() == stops
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_damaged_model_ends_the_server_with_the_reason(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    (copy / "tiny" / "1" / "layer_02.onnx").write_bytes(b"")
    monkeypatch.setattr("de3.server.main.stop_signals", list)  # the handlers of this process stay
    options = ("--store", str(copy), "--model", "tiny", "--port", "0", "--processes", "1")
    assert exit_code(monkeypatch, "serve", *options) == 1
    log = capsys.readouterr().err
    assert "layer_02.onnx: damaged" in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--port 70000", "port:"),
        ("--store /nowhere", "/nowhere:"),
        ("--demo", "--store"),
        ("--model [/x]", "'[/x]'"),
        ("--model tiny --port {taken}", "--port"),
        ("--model tiny --trusted-proxy 10.0.0.1/99", "trusted_proxies.0: '10.0.0.1/99'"),
        ("--model tiny-int8 --processes 2 --traces", "traces: needs the otel extra"),
        *((f"--alias x=other --processes {n}", "--alias x=other: other is not served") for n in (1, 2)),
    ],
)
def test_wrong_settings_are_one_line_before_models_are_loaded(
    store: Path,
    arguments: str,
    names: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("de3.server.main.HttpServer.run", lambda _: pytest.fail("the models are loaded"))
    monkeypatch.setattr(Supervisor, "run", lambda _: pytest.fail("processes are started"))
    monkeypatch.setattr("de3.server.http.traces.version", version_without_otel)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = arguments.format(taken=taken.getsockname()[1]).split()
        assert exit_code(monkeypatch, "serve", "--store", str(store), *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and names in line


def test_a_client_that_does_not_read_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.5)
    answered = server.metric("de3_requests_total", status="200")
    dropped = server.metric("de3_dropped_connections_total", reason="unread")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        # The answer is more than the buffers hold.
        client.sendall(post({"input": ["good"] * 1024, "explain": True}))
        until(lambda: server.metric("de3_requests_total", status="200") > answered, "the first answer")
        until(lambda: not server.listener.connections, "the connection to be cut")
        info = (socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        until(lambda: client.getsockopt(*info)[0] == connection.TCP_CLOSE, "the reset of the connection")
    assert server.metric("de3_dropped_connections_total", reason="unread") == dropped + 1
    assert server.classify(input="good").status_code == 200


def test_a_slow_client_that_reads_is_not_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.sendall(post({"input": ["good"] * 1024, "explain": True}))
        until(lambda: len(server.listener._paused) == 1, "more than the buffers hold")
        until(lambda: server.service.in_flight == 0, "the request to count as answered")
        (reading,) = server.listener.connections
        assert reading.write_deadline < inf
        answer = HTTPResponse(client)
        answer.begin()
        assert len(json.loads(answer.read())["data"]) == 1024
        until(lambda: len(server.listener._paused) == 0, "the client to have read")
        assert reading.write_deadline == inf


def test_many_connections_are_accepted_in_one_iteration_of_the_event_loop(server: Server) -> None:
    count, connections, all_wait, seen = 64, server.listener.connections, Event(), list[int]()
    with ExitStack() as clients:

        def connect() -> None:
            clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))

        def iterate() -> None:
            seen.append(len(connections))
            if seen[-1] <= count:
                loop.call_soon(iterate)

        connect()
        until(lambda: len(connections) == 1, "a connection")
        loop = next(iter(connections)).loop
        loop.call_soon_threadsafe(lambda: (all_wait.wait(60), iterate()))
        for _ in range(count):
            connect()
        all_wait.set()
        until(lambda: seen and seen[-1] > count, "all connections")
        assert len(seen) <= 2 * count / ACCEPTS + 1
