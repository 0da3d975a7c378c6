"""Engine threads survive errors in the code that they call.

If a thread is lost nevertheless, the server exits, so that its supervisor restarts it.
"""

import logging
from contextlib import suppress
from pathlib import Path
from unittest import mock

import httpx
import pytest

from de3.model_store.tokenizer import TextTokenizer
from de3.runtime import failures
from de3.runtime.background import errors
from de3.runtime.engine import engine, group
from de3.runtime.engine.engine import Engine
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.failures import FailureLog
from de3.server import service
from de3.server.http import endpoint
from de3.server.service import EngineError
from tests.serving import Server, process, serving, until, url_when_ready


class Panic(BaseException):
    """An error like the panics of Rust libraries, which do not derive from Exception."""


def test_errors_end_no_thread_and_each_kind_is_logged_once(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, group, endpoint):  # the modules' own logs are shared with other tests
        monkeypatch.setattr(module, "failures", FailureLog(logging.getLogger("de3")))
    before, take = errors["engine"], WorkQueue.next
    broken = mock.Mock(side_effect=[ValueError("a broken queue")] * 3 + [None] * 1000)
    monkeypatch.setattr(WorkQueue, "next", lambda *given: (broken(), take(*given))[1])
    with serving(store, models=["tiny", "tiny-int8"], threads=1) as server:
        for error in (RuntimeError("forged"), Panic("forged")):
            assert server.classify(input="good").status_code == 200
            assert errors["engine"] - before == 3
            with mock.patch.object(TextTokenizer, "encode", side_effect=error):
                for model in ("tiny", "tiny-int8") * 5:
                    failed = server.classify(input=["good", "bad"], model=model)
                    assert failed.status_code == 500 and "forged" not in failed.text
                    assert failed.json()["error"]["type"] == "InternalServerError"
                failed = httpx.post(server.url + "/predict", json={"inputs": "good"})
                assert (failed.status_code, failed.json()["error_type"]) == (500, "backend")
        assert server.metric("de3_requests_total", model="tiny:1", status="500") == 12
        assert server.classify(input="good").status_code == 200
    logged = [record.getMessage().split()[0] for record in caplog.records if record.module == "failures"]
    # Of both errors: "a group", "an item"; each request then fails by the same one.
    assert sorted(logged) == ["a", "a", "an", "an", "engine", "request"]


def test_one_traceback_a_minute_for_each_of_a_limited_number_of_kinds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, log = 1000.0, FailureLog(logging.getLogger("de3"))
    monkeypatch.setattr(failures, "monotonic", lambda: now)
    monkeypatch.setattr(failures, "MAX_KINDS", 3)

    def logged(*kinds: type[Exception]) -> list[str]:
        caplog.clear()
        for kind in kinds:
            try:
                raise kind
            except kind:
                log.exception("%s", kind.__name__)
        assert all(record.exc_info for record in caplog.records)
        return caplog.messages

    assert logged(*[ValueError] * 5, KeyError) == ["ValueError", "KeyError"]
    now += 61
    repeated = "ValueError (and 4 times since such an error was last logged)"
    assert logged(ValueError, KeyError) == [repeated, "KeyError"]
    others = [OSError, TypeError, RuntimeError]  # of the first kinds, none is remembered now
    assert logged(*others, *others, KeyError) == ["OSError", "TypeError", "RuntimeError", "KeyError"]


def test_an_ended_thread_is_detected(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_step", lambda *_: False)
    server = Server(service.Service(service.Settings(store=store, models=["tiny"], port=0)))
    server.start()
    try:
        until(lambda: server.service.state == "failed", "the loss to be seen")
        assert isinstance(server.service.failure, EngineError)
        assert server.metric("de3_engine_failures_total") == 1
        assert server.metric("de3_ready") == 0
        ready = httpx.get(server.url + "/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": "failed"})
    finally:
        server.stop()


STUCK = """
import sys, time
from de3.server import service
from de3.runtime import failures
from de3.runtime.engine import engine
from de3.cli import main
service.CHECK_S, engine.STUCK_CHECKS = 0.05, 8
runs, run = [], engine.run
def stuck(*arguments):
    runs.append(1)
    if len(runs) > 40:
        time.sleep(600)
    return run(*arguments)
engine.run = stuck
sys.argv = ["de3", *sys.argv[1:]]
main()
"""


def test_a_server_with_a_stuck_thread_exits_non_zero_but_not_one_that_is_always_busy(store: Path) -> None:
    options = ["--model", "tiny", "--threads", "1", "--timeout-s", "0.3"]
    with process(store, *options, code=STUCK) as running:
        url = url_when_ready(running)
        statuses = list[int]()
        with suppress(httpx.TransportError):
            while running.poll() is None:
                answer = httpx.post(url + "/classify", json={"input": "good " * 60, "tau": 0}, timeout=30)
                statuses.append(answer.status_code)
        assert len(statuses) > 40 and statuses[-1] == 504
        assert running.wait(60) == 1


HUNG = """
import sys, time
from de3.server import service
from de3.runtime.engine import engine
from de3.cli import main
service.CHECK_S, service.HUNG_CHECKS = 0.05, 100
runs, run_group = [], engine.run_group
def hung(*arguments):
    runs.append(arguments)
    if len(runs) > 40:
        time.sleep(600)
    return run_group(*arguments)
engine.run_group = hung
sys.argv = ["de3", *sys.argv[1:]]
main()
"""


def test_a_server_whose_event_loop_hangs_in_a_kernel_exits_non_zero(store: Path) -> None:
    with process(store, "--model", "tiny-int8", "--threads", "1", code=HUNG) as running:
        url = url_when_ready(running)
        answered = 0
        with suppress(httpx.TransportError):
            while True:
                httpx.post(url + "/classify", json={"input": "good", "tau": 1}, timeout=30)
                answered += 1
        assert answered == 40
        assert running.wait(60) == 1
