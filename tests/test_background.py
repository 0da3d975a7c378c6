"""Background tasks: an unexpected error is logged and counted, and the task goes on while requests are answered."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
import uvloop

from de3.runtime import background
from de3.runtime.background import Backoff, errors, report_unhandled, run_once
from de3.runtime.engine import audit
from de3.runtime.engine.engine import Engine
from de3.runtime.errors import RequestError
from de3.runtime.failures import FailureLog
from de3.server import service
from de3.server.audit import ledgers
from de3.server.audit.auditor import Auditor
from de3.server.audit.ledgers import Ledgers
from de3.server.http.traces import Traces
from de3.server.learn import learner as learner_module
from de3.server.learn import learners
from de3.server.learn.learners import Learners
from de3.server.overload import Controller
from de3.server.shared_run import SharedRun
from tests.fixtures import make_rows
from tests.serving import Server, in_event_loop, serving, until

UNEXPECTED = RuntimeError("unexpected")


def fails_once(function: Callable[..., Any]) -> Any:
    """The function, but its first call raises an error; `calls` counts its calls."""

    def call(*arguments: Any, **named: Any) -> Any:
        call.calls += 1
        if call.calls == 1:
            raise RuntimeError("unexpected")
        return function(*arguments, **named)

    call.calls = 0
    return call


@pytest.fixture(autouse=True)
def no_errors_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "failures", FailureLog(logging.getLogger("de3")))
    errors.clear()


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with every background task, each of which runs often."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (service, learners):
            patch.setattr(module, "CHECK_S", 0.02)
        patch.setattr(ledgers, "SAVE_S", 0.02)
        patch.setattr(audit, "MOST_WAIT_S", 0.02)
        patch.setattr("de3.server.learn.learner.FIRST_FIT", 10**9)
        options = {"learn": True, "guarantee": 0.2, "audit_share": 1.0, "slo_p99_ms": 60_000.0}
        folder = tmp_path_factory.mktemp("state")
        with serving(store, models=["tiny"], threads=1, state_dir=folder, **options) as server:
            yield server


@pytest.mark.parametrize(
    "task, owner, name",
    [
        ("engine_watchdog", Engine, "problem"),
        ("load_control", Controller, "tick"),
        ("saving_audits", Ledgers, "_save"),
        ("learning", Learners, "_check"),
        ("audits", audit.AuditThreads, "_next"),
        ("engine_callback", Auditor, "_done"),
        ("counting_audits", Auditor, "answered"),
        ("counting_texts", Engine, "_observe"),
    ],
)
def test_a_task_of_the_server_goes_on(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    task: str,
    owner: Any,
    name: str,
) -> None:
    owner = server.service.engine if name == "_observe" else owner
    failing = fails_once(getattr(owner, name))
    monkeypatch.setattr(owner, name, failing)

    texts = iter(make_rows(5000, 17))

    def has_gone_on() -> bool:
        assert server.classify(input=next(texts)[0]).status_code == 200
        return errors[task] == 1 and failing.calls > 1

    until(has_gone_on, f"{task} to go on")
    assert f"{task.replace('_', ' ')} failed" in caplog.text and "unexpected" in caplog.text
    assert httpx.get(server.url + "/ready").status_code == 200
    assert server.metric("de3_background_errors_total", task=task) == 1


def test_a_fit_that_fails_unexpectedly_is_reported(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learner_module, "MIN_RECORDS", 1)
    monkeypatch.setattr(learners, "run_fit", mock.AsyncMock(side_effect=UNEXPECTED))
    (learner,) = server.service.shared.audit_store.learners.all  # type: ignore[attr-defined]
    server.classify(input=["good", "bad"])
    until(lambda: learner.count, "a record")
    learner.is_asked = True
    until(lambda: learner.journal.results, "the result")
    assert learner.journal.results[-1].outcome == "failed" and learner.phase == "recording"
    assert errors["fit"] == 1 and "unexpected" in caplog.text
    assert "unexpected" not in learner.journal.results[-1].error


def test_pauses_grow_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(background, "monotonic", lambda: now[0])
    backoff, pauses = Backoff(), []
    for _ in range(12):
        pauses.append(backoff.pause_s())
        now[0] += pauses[-1]
    assert pauses[:3] == [0.1, 0.2, 0.4] and pauses[-2:] == [30.0, 30.0]
    now[0] += 30.1  # it ran for longer than the longest pause
    assert backoff.pause_s() == 0.1


def test_errors_that_nobody_awaits_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        report_unhandled(asyncio.get_running_loop())
        run_once("a task", mock.AsyncMock(side_effect=RuntimeError("in a task"))())  # type: ignore[arg-type]
        asyncio.get_running_loop().call_soon(mock.Mock(side_effect=RuntimeError("in a callback")))
        while errors.total() < 2:
            await asyncio.sleep(0)

    uvloop.run(run())
    assert errors == {"a task": 1, "event_loop": 1}
    assert "in a task" in caplog.text and "in a callback" in caplog.text


@in_event_loop
async def test_requests_share_a_run_whose_error_is_reported_once_even_if_their_clients_are_gone() -> None:
    shared, runs = SharedRun[None]("report", most=2), list[Exception]()
    for error, reported in ((RequestError("refused"), 0), (RuntimeError("unexpected"), 1)):
        may_fail = asyncio.Event()

        async def run(may_fail: asyncio.Event = may_fail, error: Exception = error) -> None:
            runs.append(error)
            await may_fail.wait()
            raise error

        requests = [asyncio.create_task(shared.result(run)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="2 requests are already waiting"):
            await shared.result(run)
        for request in requests:
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
        may_fail.set()
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert runs[-1] == error and errors == Counter(report=reported)
    assert len(runs) == 2
    with pytest.raises(RuntimeError):  # whoever waits for it reports it
        await shared.result(mock.AsyncMock(side_effect=RuntimeError("unexpected")))
    assert errors == {"report": 1}


def test_an_error_while_the_last_traces_are_sent_is_reported() -> None:
    provider = mock.Mock(shutdown=fails_once(lambda: None))
    Traces(provider).stop()
    assert errors == {"traces": 1}
