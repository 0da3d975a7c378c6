"""The server under trouble: loading, overload, time-outs, clients that leave, and the end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from model_store.model import Model
from model_store.store import StoreError
from server.service import Service
from server.settings import Settings
from tests.serving import Gate, Server, serving, until


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
        assert "4 texts wait and at most 4 may" in refused.json()["error"]["message"]
        assert httpx.get(server.url + "/health").status_code == 200
        gate.open()
        assert [f.result().status_code for f in accepted] == [200, 200]
        assert server.classify(input="one more").status_code == 200
        assert server.metric("de3_rejected_total", cause="queue_full") == 1


def test_a_request_without_an_answer_in_time_is_504(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, threads=1, timeout_s=0.2) as server:
        late = server.classify(input=["good", "bad"])
        assert late.status_code == 504
        assert "no answer within 0.2 s" in late.json()["error"]["message"]
        assert len(server.service.engine.queue) == 0  # its texts take no room any more
        gate.open()
        assert server.classify(input="good", model="tiny").status_code == 200
        assert server.metric("de3_exit_layer_count", model="tiny:1") == 1  # and never ran


def test_a_client_that_leaves_costs_nothing_more(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with serving(store, threads=1) as server:
        body = json.dumps({"input": ["good", "bad", "fine"], "model": "tiny"}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
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
    from model_store.model import Segment

    entered, go_on, ran = threading.Event(), threading.Event(), []
    run = Segment.run

    def slow(segment: Segment, hidden: object) -> object:
        ran.append(segment.layer)
        if segment.layer == 1:
            entered.set()
            go_on.wait(20)
        return run(segment, hidden)  # type: ignore[arg-type]

    with serving(store, threads=1, models=["tiny"]) as server:
        monkeypatch.setattr(Segment, "run", slow)
        body = b'{"input": "good", "tau": 0}'
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            assert entered.wait(20)
        until(lambda: server.metric("de3_rejected_total", cause="client_gone") == 1, "the departure")
        go_on.set()
        monkeypatch.undo()
        assert server.classify(input="good").status_code == 200
        assert ran == [1]


def test_a_body_that_does_not_come_is_408(store: Path) -> None:
    with (
        serving(store, body_timeout_s=0.1) as server,
        socket.create_connection(("127.0.0.1", server.port)) as s,
    ):
        s.settimeout(20)
        s.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b"408" in s.recv(4096)


def test_an_item_that_crashes_is_500_and_the_server_goes_on(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(store) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Model, "tokenize", lambda *_: 1 / 0)
            broken = server.classify(input=["good", "bad"])
        assert broken.status_code == 500
        assert broken.json()["error"]["type"] == "InternalServerError"
        assert "division" not in broken.text
        assert server.classify(input="good").status_code == 200


def test_not_ready_while_loading_then_ready(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server import service as services

    go_on = threading.Event()
    load = services._load
    monkeypatch.setattr(services, "_load", lambda artifact: (go_on.wait(30), load(artifact))[1])
    server = Server(Service(Settings(store=store)))
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
def test_settings_check_themselves(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_a_store_without_models_is_refused_before_the_port_opens(tmp_path: Path, store: Path) -> None:
    with pytest.raises(StoreError, match="holds no model"):
        Service(Settings(store=tmp_path))
    with pytest.raises(StoreError, match="no model 'other'"):
        Service(Settings(store=store, models=["other"]))


@contextmanager
def process(store: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`de3 serve` as a user runs it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "de3.cli", "serve", "--store", str(store), *arguments]
    running = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "DE3_PORT": str(port)}
    )
    try:
        yield running, f"http://127.0.0.1:{port}"
    finally:
        running.kill()
        running.communicate()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_sigterm_answers_everything_that_was_accepted(store: Path) -> None:
    with (
        process(store, "--threads", "1", "--model", "tiny") as (running, url),
        ThreadPoolExecutor(16) as pool,
    ):
        until(lambda: is_ready(url), "readiness")
        body = {"input": ["good film and a dull plot " * 12] * 256, "tau": 0}
        answers = [pool.submit(httpx.post, url + "/classify", json=body, timeout=60) for _ in range(4)]

        def waiting() -> float:
            lines = httpx.get(url + "/metrics").text.splitlines()
            values = {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x.startswith("de3_"))}
            return values["de3_in_flight_requests"] == 4 and values["de3_queue_texts"] > 500

        until(waiting, "four requests in flight")
        running.send_signal(signal.SIGTERM)
        assert [len(a.result().json()["data"]) for a in answers] == [256] * 4
        assert running.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")


@pytest.mark.slow
def test_a_damaged_model_ends_the_server_with_the_reason(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    (copy / "tiny" / "1" / "layer_02.onnx").write_bytes(b"")
    with process(copy, "--model", "tiny") as (running, _):
        _, log = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "layer_02.onnx: damaged" in log.replace("\n", "")
        assert "Traceback" not in log
