"""The server in adverse conditions: loading, overload, timeouts, clients that disconnect, and shutdown."""

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from http.client import HTTPResponse
from math import inf
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import httpx
import pytest

from de3.loadtest.client import post
from de3.server import manager
from de3.server.http import connection
from de3.server.http.http_server import ACCEPTS, HttpServer, stop_signals
from de3.server.processes.supervisor import Supervisor
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import CERTIFICATES, Gate, Server, process, serving, until, url_when_ready


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny"], threads=1, max_texts=1024) as running:
        yield running


def test_a_full_queue_is_503_and_an_answer_that_is_late_504(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with (
        serving(store, models=["tiny"], threads=1, max_queue=4, max_texts=4) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        with monkeypatch.context() as patch:
            server.change(patch, timeout_s=0.1)
            late = server.classify(input=["good", "bad"])
        assert late.status_code == 504 and int(late.headers["retry-after"]) >= 1
        assert "no answer within 0.1 s" in late.json()["error"]["message"]
        assert len(server.service.engine.queue) == 0  # the texts of the request have left the queue
        accepted = [pool.submit(server.classify, input=["good"] * 2) for _ in range(2)]
        until(lambda: len(server.service.engine.queue) == 4, "the queue to fill")
        refused = server.classify(input="one more")
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert "4 texts are in flight; at most 4 are allowed" in refused.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200
        gate.open()
        assert [f.result().status_code for f in accepted] == [200, 200]
        assert server.classify(input="one more").status_code == 200
        assert server.metric("de3_rejected_total", cause="queue_full") == 1
        assert server.metric("de3_exit_layer_count", model="tiny:1") == 5  # those that were late never ran


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


def test_of_a_request_with_a_bad_text_no_later_text_runs(server: Server) -> None:
    ran = partial(server.metric, "de3_exit_layer_count", model="tiny:1")
    before = ran()
    failed = server.classify(input=["good " * 80] + ["good"] * 50, truncate=False)
    assert failed.status_code == 422 and failed.json()["error"]["param"] == "input[0]"
    assert server.classify(input="good").status_code == 200
    until(lambda: ran() > before, "the last text to be counted")
    assert ran() == before + 1


def test_a_server_says_that_it_is_loading_ready_or_draining(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process is ready, this one is, too: its requests wait for the models."""
    go_on, load, others_ready = Event(), manager.load, mock.AsyncMock(return_value=False)
    monkeypatch.setattr(manager, "load", lambda *a: (go_on.wait(60), load(*a))[1])
    server = Server(Service(Settings(store=store, port=0, models=["tiny"], processes=2)))
    monkeypatch.setattr(server.service.shared, "others_ready", others_ready)
    server.start()

    def ready(path: str = "/ready") -> tuple[int, str]:
        answer = httpx.get(server.url + path)
        return answer.status_code, answer.json().get("status")

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        stack.callback(server.stop)
        stack.callback(go_on.set)
        assert httpx.get(server.url + "/health").status_code == 200
        assert ready() == (503, "loading")
        early = server.classify(input="good")
        assert early.status_code == 503 and "loading" in early.json()["error"]["message"]
        assert early.headers["retry-after"] == "1"
        others_ready.return_value = True
        assert ready()[0] == ready("/v2/health/ready")[0] == 200
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
        server.service.drain()
        assert ready() == (503, "draining")
        assert server.metric("de3_ready") == 0
        assert server.classify(input="good").status_code == 200


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of `de3` with these arguments, in this process."""
    from de3.cli import main

    monkeypatch.setattr(sys, "argv", ["de3", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code


DRAINS_FIRST = """
import sys, threading
from de3.cli import main
from de3.runtime.engine.queue import WorkQueue
from de3.server.service import Service
draining, drain, take = threading.Event(), Service.drain, WorkQueue.next
drains = []
def drained(service):
    drain(service)
    drains.append(1)
    if len(drains) == 2:
        draining.set()
Service.drain = drained
WorkQueue.next = lambda *arguments: (draining.wait(60), take(*arguments))[1]
sys.argv = ["de3", *sys.argv[1:]]
main()
"""


@pytest.mark.usefixtures("hangup")
def test_a_draining_server_answers_until_the_second_signal_and_then_what_it_has_accepted(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, ThreadPoolExecutor(4) as pool:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with process(store, "--model", "tiny", "--drain-s", "600", code=DRAINS_FIRST) as running:
            url = url_when_ready(running)
            assert systemd.recv(100) == b"READY=1"
            get, post = partial(httpx.get, verify=CERTIFICATES), partial(httpx.post, verify=CERTIFICATES)
            with httpx.Client(base_url=url, verify=CERTIFICATES) as idle:
                assert "connection" not in idle.get("/ready").headers
                running.send_signal(signal.SIGHUP)
                until(lambda: get(url + "/ready").status_code == 503, "the drain")
                assert systemd.recv(100) == b"STOPPING=1"
                assert idle.get("/health").headers["connection"] == "close"
            answers = [pool.submit(post, url + "/classify", json={"input": ["good"] * 8}) for _ in range(4)]
            until(lambda: "de3_in_flight_requests 4.0" in get(url + "/metrics").text, "four requests")
            running.send_signal(signal.SIGTERM)
            for answer in answers:
                assert len(answer.result().json()["data"]) == 8
                assert answer.result().headers["connection"] == "close"
            assert running.wait(30) == 0


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
        ("--demo", "--store"),
        ("--model [/x]", "'[/x]'"),
        ("--model tiny --port {taken}", "--port"),
        ("--model tiny --trusted-proxy 10.0.0.1/99", "trusted_proxies.0: '10.0.0.1/99'"),
        *(
            (f"--alias x=other --processes {n} --port {{taken}}", "--alias x=other: other is not served")
            for n in (1, 2)
        ),
    ],
)
def test_wrong_settings_are_one_line_before_models_are_loaded(
    store: Path,
    arguments: str,
    names: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for owner in (HttpServer, Supervisor):
        monkeypatch.setattr(owner, "run", lambda *_: pytest.fail("models are loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = arguments.format(taken=taken.getsockname()[1]).split()
        assert exit_code(monkeypatch, "serve", "--store", str(store), *words) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and names in line


def test_a_client_that_does_not_read_is_cut_off_and_a_slow_one_is_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = partial(server.metric, "de3_dropped_connections_total", reason="unread")
    before, connections = dropped(), server.listener.connections
    until(lambda: not connections, "the connections to end")
    request = post({"input": ["good"] * 1024, "explain": True})  # its answer is more than the buffers hold
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(request)
        until(lambda: any(one.write_deadline < inf for one in connections), "full buffers")
        until(lambda: server.service.in_flight == 0, "the request to count as answered")
        (one,) = connections
        answer = HTTPResponse(client)
        answer.begin()
        assert len(json.loads(answer.read())["data"]) == 1024
        until(lambda: one.write_deadline == inf, "the client to have read")
        monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.3)
        client.sendall(request)
        until(lambda: not connections, "the connection to be cut")
        info = (socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        until(lambda: client.getsockopt(*info)[0] == connection.TCP_CLOSE, "the reset of the connection")
    assert dropped() == before + 1
    assert server.classify(input="good").status_code == 200


def test_many_connections_are_accepted_in_one_iteration_of_the_event_loop(server: Server) -> None:
    count, connections, all_wait, seen = 64, server.listener.connections, Event(), list[int]()
    address = ("127.0.0.1", server.port)
    with ExitStack() as clients:

        def iterate() -> None:
            seen.append(len(connections))
            if seen[-1] <= count:
                loop.call_soon(iterate)

        clients.enter_context(socket.create_connection(address))
        until(lambda: len(connections) == 1, "a connection")
        loop = next(iter(connections)).loop
        loop.call_soon_threadsafe(lambda: (all_wait.wait(60), iterate()))
        for _ in range(count):
            clients.enter_context(socket.create_connection(address))
        all_wait.set()
        until(lambda: seen and seen[-1] > count, "all connections")
        assert len(seen) <= 2 * count / ACCEPTS + 1
