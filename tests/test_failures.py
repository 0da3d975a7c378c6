"""Errors that a client can repeat do not fill the log."""

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.model_store.tokenizer import TextTokenizer
from de3.server import failures
from de3.server.engine import engine, group
from de3.server.failures import FailureLog
from de3.server.http import endpoint
from tests.serving import serving


def fail(errors: FailureLog, kind: type[Exception], name: str) -> None:
    try:
        raise kind(name)
    except kind:
        errors.exception("request %s failed", name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of every FailureLog, in seconds, as a list of one number that a test can change."""
    now = [1000.0]
    monkeypatch.setattr(failures, "monotonic", lambda: now[0])
    return now


def test_one_traceback_a_minute_for_each_kind(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    errors = FailureLog(logging.getLogger("de3"))
    for i in range(5):
        fail(errors, ValueError, f"a{i}")
    fail(errors, KeyError, "b")
    assert [r.getMessage() for r in caplog.records] == ["request a0 failed", "request b failed"]
    assert all(record.exc_info for record in caplog.records)
    caplog.clear()
    clock[0] += 61
    fail(errors, ValueError, "c")
    fail(errors, KeyError, "d")
    assert [r.getMessage() for r in caplog.records] == [
        "request c failed (and 4 times since such an error was last logged)",
        "request d failed",
    ]


def test_the_number_of_kinds_is_limited(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MAX_KINDS", 3)
    errors = FailureLog(logging.getLogger("de3"))
    for i in range(10):
        fail(errors, type(f"Error{i}", (Exception,), {}), "a")
    assert len(errors._seen) == 3


def test_texts_that_fail_are_not_all_logged(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, group, endpoint):  # the modules' own logs are shared with other tests
        monkeypatch.setattr(module, "failures", FailureLog(logging.getLogger("de3")))
    with serving(store, models=["tiny", "tiny-int8"], threads=1) as server:
        assert server.classify(input="good").status_code == 200  # the engine's thread has warmed up

        def broken(*_: Any) -> Any:
            raise RuntimeError("forged")

        with monkeypatch.context() as patch:
            patch.setattr(TextTokenizer, "encode", broken)
            for model in ("tiny", "tiny-int8") * 5:
                assert server.classify(input="good", model=model).status_code == 500
            failed = httpx.post(server.url + "/predict", json={"inputs": "good"})
            assert (failed.status_code, failed.json()["error_type"]) == (500, "backend")
        assert server.classify(input="good", model="tiny").status_code == 200
    logged = [record.getMessage().split()[0] for record in caplog.records if record.module == "failures"]
    assert sorted(logged) == ["a", "an", "request"]  # one line each for "a group", "an item" and "request"
