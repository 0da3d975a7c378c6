"""Engine threads survive errors in the code that they call.

If a thread is lost nevertheless, the server exits, so that its supervisor restarts it.
"""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.server import service
from de3.server.background import errors
from de3.server.engine import engine
from de3.server.engine.engine import Engine
from de3.server.engine.queue import WorkQueue
from de3.server.service import EngineError
from tests.serving import Server, process, serving, until, url_when_ready


def test_an_error_in_queue_or_engine_ends_no_thread(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, failures = WorkQueue.next, []

    def broken(queue: WorkQueue, threads: int) -> Any:
        if len(failures) < 3:
            failures.append(1)
            raise ValueError("a broken queue")
        return take(queue, threads)

    before = errors["engine"]
    monkeypatch.setattr(WorkQueue, "next", broken)
    with serving(store, models=["tiny"], threads=1) as server:
        assert server.classify(input="good").status_code == 200
        assert errors["engine"] - before == len(failures) == 3
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "_finish", lambda *_: 1 / 0)
            assert server.classify(input="good").status_code == 500
        assert server.classify(input="good").status_code == 200


def lost(server: Server) -> None:
    until(lambda: server.service.state == "failed", "the loss to be seen")
    assert isinstance(server.service.failure, EngineError)
    assert server.metric("de3_engine_failures_total") == 1
    assert server.metric("de3_ready") == 0
    ready = httpx.get(server.url + "/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "failed"})


def test_an_ended_thread_is_detected(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "CHECK_S", 0.05)
    monkeypatch.setattr(Engine, "_step", lambda *_: False)
    server = Server(service.Service(service.Settings(store=store, models=["tiny"], port=0)))
    server.start()
    try:
        lost(server)
    finally:
        server.stop()


def test_a_stuck_thread_is_detected_and_no_slow_one(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from de3.model_store.segments import OnnxLayers

    monkeypatch.setattr(service, "CHECK_S", 0.05)
    monkeypatch.setattr(engine, "STUCK_CHECKS", 8)
    stuck, go_on, run = threading.Event(), threading.Event(), OnnxLayers.run

    def slow(layers: OnnxLayers, layer: int, hidden: Any) -> Any:
        if stuck.is_set():
            go_on.wait(60)
        return run(layers, layer, hidden)

    with serving(store, models=["tiny"], threads=1) as server:
        monkeypatch.setattr(OnnxLayers, "run", slow)
        for _ in range(30):  # always busy, but never stuck
            assert server.classify(input="good " * 60, tau=0).status_code == 200
        assert server.service.state == "ready"
        stuck.set()
        waiting = threading.Thread(target=lambda: server.classify(input="good", tau=0))
        waiting.start()
        lost(server)
        go_on.set()
        waiting.join(20)


STUCK = """
import sys, threading, time
from de3.server import service
from de3.server.engine import engine
from de3.cli import main
service.CHECK_S, engine.STUCK_CHECKS = 0.05, 8
engine.run_group = engine.run = lambda *_: time.sleep(600)
sys.argv = ["de3", *sys.argv[1:]]
main()
"""


def test_a_server_with_a_stuck_thread_exits_non_zero(store: Path) -> None:
    options = ["--model", "tiny", "--threads", "1", "--timeout-s", "0.3"]
    with process(store, *options, code=STUCK) as running:
        url = url_when_ready(running)
        assert httpx.post(url + "/classify", json={"input": "good"}, timeout=30).status_code == 504
        assert running.wait(60) == 1
