"""The server in adverse conditions: loading, overload, time-outs, clients that disconnect, and shutdown."""

import json
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path

import httpx
import pytest

from de3.model_store.store import Store, StoreError
from de3.model_store.tokenizer import TextTokenizer
from de3.server.http import connection
from de3.server.http.http_server import ACCEPTS
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import Gate, Server, process, serving, until, url_when_ready


def test_a_full_queue_is_503_with_retry_after_and_loses_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with serving(store, threads=1, max_queue=4, max_texts=4) as server, ThreadPoolExecutor(8) as pool:
        accepted = [pool.submit(server.classify, input=["good"] * 2) for _ in range(2)]
        until(lambda: len(server.service.engine.queue) == 4, "the queue to fill")
        refused = server.classify(input="one more")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        assert "4 texts are in flight, at most 4 are allowed" in refused.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200
        gate.open()
        assert [f.result().status_code for f in accepted] == [200, 200]
        assert server.classify(input="one more").status_code == 200
        assert server.metric("de3_rejected_total", cause="queue_full") == 1


def test_a_request_without_an_answer_in_time_is_504(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, threads=1, timeout_s=1) as server:
        late = server.classify(input=["good", "bad"])
        assert late.status_code == 504
        assert "no answer within 1 s" in late.json()["error"]["message"]
        assert len(server.service.engine.queue) == 0  # the texts of the request have left the queue
        gate.open()
        assert server.classify(input="good", model="tiny").status_code == 200
        assert server.metric("de3_exit_layer_count", model="tiny:1") == 1  # those texts never ran


def test_a_client_that_leaves_costs_nothing_more(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, threads=1) as server:
        body = json.dumps({"input": ["good", "bad", "fine"], "model": "tiny"}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            until(lambda: len(server.service.engine.queue) == 3, "the texts to wait")
        until(lambda: len(server.service.engine.queue) == 0, "the texts to be dropped")
        gate.open()
        assert server.classify(input="good", model="tiny").status_code == 200
        assert server.metric("de3_exit_layer_count", model="tiny:1") == 1
        assert server.metric("de3_rejected_total", cause="client_gone") == 1


def test_a_client_that_leaves_stops_its_text_at_the_next_layer(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from de3.model_store.segments import OnnxSegment as Segment

    entered, go_on, ran = threading.Event(), threading.Event(), []
    run = Segment.run

    def slow(segment: Segment, hidden: object, with_exit: bool) -> object:
        ran.append(segment.layer)
        if segment.layer == 1:
            entered.set()
            go_on.wait(20)
        return run(segment, hidden, with_exit)  # type: ignore[arg-type]

    with serving(store, threads=1, models=["tiny"]) as server:
        assert server.classify(input="good").status_code == 200  # warms up the engine thread
        monkeypatch.setattr(Segment, "run", slow)
        body = b'{"input": "good", "tau": 0}'
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            assert entered.wait(20)
        until(lambda: server.metric("de3_rejected_total", cause="client_gone") == 1, "the departure")
        go_on.set()
        monkeypatch.undo()
        assert server.classify(input="good").status_code == 200
        assert ran == [1]


def test_a_client_that_does_not_read_occupies_no_slot(store: Path) -> None:
    with serving(store, max_queue=300, max_texts=300) as server:
        body = json.dumps({"input": ["good film"] * 300, "explain": True}).encode()
        request = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            s.sendall(request * 30)  # pipelined; the client reads no answer
            until(lambda: server.listener.paused_connections == 1, "more answers than the buffers hold")
            until(lambda: server.service.in_flight == 0, "the requests to count as answered")
            assert server.classify(input="good").status_code == 200


def test_a_body_that_does_not_arrive_is_408(store: Path) -> None:
    with (
        serving(store, body_timeout_s=0.1) as server,
        socket.create_connection(("127.0.0.1", server.port)) as s,
    ):
        s.settimeout(20)
        s.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in s.recv(4096)


def test_an_item_that_crashes_is_500_and_the_server_goes_on(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(store) as server:
        with monkeypatch.context() as patch:
            patch.setattr(TextTokenizer, "encode", lambda *_: 1 / 0)
            broken = server.classify(input=["good", "bad"])
        assert broken.status_code == 500
        assert server.metric("de3_requests_total", model="tiny:1", status="500") == 1
        assert broken.json()["error"]["type"] == "InternalServerError"
        assert "division" not in broken.text
        assert server.classify(input="good").status_code == 200


def test_a_panic_in_a_library_does_not_end_an_engine_thread(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """An error like the panics of Rust libraries, which do not derive from Exception."""

    def panic(*_: object) -> None:
        raise Panic

    with serving(store, threads=1) as server:
        with monkeypatch.context() as patch:
            patch.setattr(TextTokenizer, "encode", panic)
            assert server.classify(input="good").status_code == 500
        assert server.classify(input="good").status_code == 200


def test_one_bad_text_frees_the_room_of_its_request(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, entered, go_on = TextTokenizer.encode, threading.Event(), threading.Event()

    def slow(tokenizer: TextTokenizer, texts: list) -> object:
        if texts[0][0] == "wait":
            entered.set()
            go_on.wait(20)
        return encode(tokenizer, texts)

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


def test_a_head_that_does_not_arrive_is_cut_off(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)
    with serving(store) as server:
        for start in (b"", b"POST /classify HTTP/1.1\r\nHost:"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
                s.sendall(start)
                assert s.recv(100) == b""
        monkeypatch.undo()  # 0.1 s is too short on a busy machine
        assert server.classify(input="good").status_code == 200


def test_not_ready_while_loading_then_ready(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from de3.server import manager

    go_on = threading.Event()
    load = manager.load
    monkeypatch.setattr(manager, "load", lambda *a: (go_on.wait(30), load(*a))[1])
    server = Server(Service(Settings(store=store, port=0, default_model="tiny")))
    server.start()
    try:
        assert httpx.get(server.url + "/health").status_code == 200
        ready = httpx.get(server.url + "/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
        early = server.classify(input="good")
        assert early.status_code == 503 and "loading" in early.json()["error"]["message"]
        assert early.headers["retry-after"] == "1"
        go_on.set()
        until(lambda: httpx.get(server.url + "/ready").status_code == 200, "readiness")
        assert server.classify(input="good").status_code == 200
    finally:
        go_on.set()
        server.stop()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_texts": 10, "max_queue": 5}, "max_texts must not exceed max_queue"),
        ({"port": 70000}, "port"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_inconsistent_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_store_without_models_is_refused_before_the_port_opens(tmp_path: Path, store: Path) -> None:
    with pytest.raises(StoreError, match="holds no model"):
        Service(Settings(store=tmp_path))
    with pytest.raises(StoreError, match="no model 'other'"):
        Service(Settings(store=store, models=["other"]))


@pytest.mark.parametrize("make", [False, True])
def test_without_a_store_the_message_names_the_next_command(
    make: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from de3.cli import main

    if make:
        (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["de3", "serve"])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and len(lines) == 1
    assert "de3 export" in lines[0] and "--store DIR" in lines[0] and "de3 serve --demo" in lines[0]


def test_demo_serves_the_demo_model_whatever_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from de3.cli import main

    served: list[Settings] = []
    monkeypatch.setattr("de3.server.main.serve", lambda settings, *_: served.append(settings))
    monkeypatch.setenv("DE3_STORE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["de3", "serve", "--demo", "--port", "8001"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    (settings,) = served
    artifact = Store(settings.store).open(settings.models[0])
    assert artifact.full_name == "sst2:1" and settings.port == 8001


def test_sigterm_answers_everything_that_was_accepted(store: Path) -> None:
    limits = ["--max-texts", "1024", "--max-queue", "8192"]
    with (
        process(store, "--threads", "1", "--model", "tiny", *limits) as running,
        ThreadPoolExecutor(4) as pool,
    ):
        url = url_when_ready(running)
        body = json.dumps({"input": ["good film and a dull plot " * 12] * 1024, "tau": 0})
        clients = [httpx.Client(base_url=url, timeout=60) for _ in range(5)]
        for client in clients:
            assert client.get("/ready").status_code == 200  # connected, so the next bytes are sent at once
        answers = [pool.submit(client.post, "/classify", content=body) for client in clients[:4]]

        def in_flight() -> bool:
            return "de3_in_flight_requests 4.0" in clients[4].get("/metrics").text

        until(in_flight, "four requests in flight")
        running.send_signal(signal.SIGTERM)
        assert [len(a.result().json()["data"]) for a in answers] == [1024] * 4
        assert running.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")


def test_a_draining_server_says_so_and_still_answers(store: Path) -> None:
    with serving(store) as server:
        server.service.drain()
        assert httpx.get(server.url + "/ready").json() == {"status": "draining"}
        assert httpx.get(server.url + "/ready").status_code == 503
        assert server.metric("de3_ready") == 0
        assert server.classify(input="good").status_code == 200


def test_a_damaged_model_ends_the_server_with_the_reason(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    (copy / "tiny" / "1" / "layer_02.onnx").write_bytes(b"")
    with process(copy, "--model", "tiny") as running:
        _, log = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "layer_02.onnx: damaged" in log
        assert "Traceback" not in log


def test_a_port_in_use_is_reported_before_models_are_loaded(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(store, "--model", "tiny", "--port", str(port)) as running:
            _, log = running.communicate(timeout=60)
    assert running.returncode == 1 and "is current" not in log
    assert "stop the other process, or give another --port" in " ".join(log.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port 70000", "error: port: Input should be less than or equal to 65535"),
        ("--timeout-s inf", "error: timeout_s: Input should be a finite number"),
        ("--max-texts 9999", "error: max_texts must not exceed max_queue"),
        (
            "--store /nowhere",
            "error: /nowhere: no such store; de3 import and de3 export create one, name another store",
        ),
        ("--demo", "error: --demo: cannot be combined with --store"),
        ("--model [/x]", "error: no model '[/x]' in"),
    ],
)
def test_wrong_settings_are_one_line(
    store: Path,
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from de3.cli import main

    monkeypatch.setattr(sys, "argv", ["de3", "serve", "--store", str(store), *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and len(lines) == 1 and lines[0].startswith(message)


def test_a_client_that_does_not_read_is_cut_off(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.5)
    with serving(store, models=["tiny"], max_texts=1024) as server:
        body = json.dumps({"input": ["good"] * 1024, "explain": True}).encode()
        head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            for _ in range(20):  # more than the system's buffers hold
                client.sendall(head + body)
            until(lambda: server.metric("de3_requests_total", status="200") >= 1, "the first answer")
            connections = server._uvicorn.server_state.connections
            until(lambda: not connections, "the connection to be cut")
        assert server.classify(input="good").status_code == 200


def test_a_slow_reader_gets_everything(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 20.0)
    with serving(store, models=["tiny"], max_texts=1024) as server:
        body = json.dumps({"input": ["good"] * 1024, "explain": True}).encode()
        head = (
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % len(body)
        )
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + body)
            received = b""
            while chunk := client.recv(32768):
                received += chunk
                time.sleep(0.01)
        assert len(json.loads(received.partition(b"\r\n\r\n")[2])["data"]) == 1024


@pytest.mark.parametrize(("protocol", "header"), [("websocket", "upGRADE"), ("h2c", "Upgrade")])
def test_an_upgrade_is_not_offered_and_costs_no_request(store: Path, protocol: str, header: str) -> None:
    """Java's client asks for an upgrade in its first request; by itself, the parser would lose that request's body."""
    body = b'{"input": "good film"}'
    head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    head += f"{header}: {protocol}\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    request = head.encode() + body
    with serving(store) as server:
        for cut in range(0, len(request), 5):  # the request may arrive in any two parts
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                s.sendall(request[:cut])
                s.sendall(request[cut:])
                for last in (False, True):  # then a second request on the same connection
                    answer = HTTPResponse(s)
                    answer.begin()
                    assert (answer.status, json.loads(answer.read())["data"][0]["index"]) == (200, 0)
                    if not last:
                        s.sendall(request)


def test_connect_is_answered(store: Path) -> None:
    with serving(store) as server, socket.create_connection(("127.0.0.1", server.port), timeout=20) as s:
        s.sendall(b"CONNECT /classify HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert s.recv(12) in (b"HTTP/1.1 405", b"HTTP/1.1 400")


def test_many_connections_are_accepted_in_one_iteration_of_the_event_loop(store: Path) -> None:
    count = 64
    with serving(store) as server, ExitStack() as clients:

        def connect() -> None:
            clients.enter_context(socket.create_connection(("127.0.0.1", server.port)))

        connections = server.listener.connections
        connect()
        until(lambda: len(connections) == 1, "a connection")
        loop = next(iter(connections)).loop
        all_wait, iterations = threading.Event(), 0

        def iterate() -> None:
            nonlocal iterations
            if len(connections) <= count:
                iterations += 1
                loop.call_soon(iterate)

        loop.call_soon_threadsafe(lambda: (all_wait.wait(60), iterate()))
        for _ in range(count):
            connect()
        all_wait.set()
        until(lambda: len(connections) > count, "all connections")
        assert iterations <= 2 * count / ACCEPTS
