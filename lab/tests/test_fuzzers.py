"""Short runs of the fuzzers; each fuzzer finds a planted fault."""

from importlib import import_module

import pytest

from de3.exits.guarantee import Guarantee
from de3.model_store import graph_check, store, tokenizer_check
from de3.server.http.connection import Connection
from lab.fuzzers import NAMES, connection
from lab.fuzzers.run import Fuzzer, fuzz


def fuzzer(name: str) -> Fuzzer:
    return import_module(f"lab.fuzzers.{name}").FUZZER  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_finds_nothing(name: str) -> None:
    report = fuzz(name, fuzzer(name), 2, at_least=20)
    assert report.findings == []
    assert report.inputs >= 20


def planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a fault in the code that a fuzzer tests."""
    match name:
        case "connection":
            monkeypatch.setattr(Connection, "_release", lambda _: None)
        case "graph":
            monkeypatch.setattr(graph_check, "MAX_NAME", None)
        case "manifest":
            monkeypatch.setattr(store, "ValidationError", KeyError)
        case "state":
            monkeypatch.setattr(Guarantee, "restore", lambda *_: {}["x"])
        case "tokenizer":
            monkeypatch.setattr(tokenizer_check, "_components", lambda *_: iter(()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer(name).prepare()
    planted(name, monkeypatch)
    report = fuzz(name, fuzzer(name), 0, reduces=False, at_least=2000)
    assert len(report.findings) > 0 and report.input is not None


# Inputs that were once findings.


@pytest.mark.parametrize("cuts", [[], [4200]])
def test_a_body_may_be_refused_as_too_large_or_as_malformed(cuts: list[int]) -> None:
    """It is too large after the first piece; if it arrives whole, its invalid trailer is noticed first."""
    head = b"GET /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"1388\r\n" + b"a" * 5000 + b"\r\n0\r\nContent-Length: 5\r\n\r\n"
    connection.check(connection.Stream(data, cuts, [0], "expire"))
