"""Short runs of the fuzzers; each fuzzer finds a planted fault."""

import json
from importlib import import_module
from typing import Any

import pytest

from de3.exits.promise import Promise
from de3.model_store import graph_check, store, tokenizer_check
from de3.server.http.connection import Connection
from lab.fuzzers import NAMES, connection, state, tokenizer
from lab.fuzzers.run import Fuzzer, fuzz
from lab.tests.commands import lab


def fuzzer(name: str) -> Fuzzer:
    return import_module(f"lab.fuzzers.{name}").FUZZER  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_finds_nothing(name: str) -> None:
    report = fuzz(name, fuzzer(name), 2)
    assert report.findings == []
    assert report.inputs > 5


def test_the_command_says_how_many_inputs_it_tried() -> None:
    assert "state: " in (said := lab("fuzz-inputs --only state --seconds 1")) and "inputs in" in said


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
            monkeypatch.setattr(Promise, "restore", lambda *_: {}["x"])
        case "tokenizer":
            monkeypatch.setattr(tokenizer_check, "_components", lambda *_: iter(()))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzzer(name).prepare()
    planted(name, monkeypatch)
    report = fuzz(name, fuzzer(name), 30, reduces=False)
    assert len(report.findings) > 0 and report.input is not None


# Inputs that were once findings.


def test_a_half_closed_connection_is_written_nothing_after_its_response() -> None:
    request = b"GET /classify HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert connection.check(connection.Stream(request, [], [0], "half-close"))[1] == "requests"


@pytest.mark.parametrize("field", ["texts", "layers"])
def test_a_state_whose_counts_leave_no_room_is_refused(field: str) -> None:
    value = json.loads(json.dumps(state._valid()))
    row = value["counts"][0]
    row[field] = 2**53 if field == "texts" else [2**53] * len(row[field])
    assert state.check(json.dumps(value).encode())[1] == "refused"


@pytest.mark.parametrize("special", ["", "[CLS]"])
def test_a_template_with_an_unknown_token_is_refused(special: str) -> None:
    template: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"SpecialToken": {"id": special, "type_id": 0}}],
        "special_tokens": {},
    }
    parts = {"normalizer": None, "pre_tokenizer": None, "post_processor": template}
    value = tokenizer.BASE | parts | {"model": tokenizer.MODEL_OF["BPE"]}
    assert tokenizer.check(json.dumps(value).encode())[1] == "refused"
