"""Tests that every protocol passes, with every kind of answer.

What only one protocol does is in the file of its peers (test_clients.py, test_guards.py, ...).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.protocols import ALL, CASES, Case
from tests.serving import Server, serving, until

TEXTS = ["a good film", "dull and boring", "it is not bad", "the plot"]
KEY = "alice-has-a-long-key"
MOST = 8  # texts of a request
LONG = "good film " * 100
ABSENT = "no texts"
GUARDS: dict[str, dict[str, Any]] = {
    "guard": {"flags": ["blame"], "tau": 0},
    "guard that truncates": {"flags": ["blame"], "tau": 0, "long_texts": ["tiny-int8=truncate"]},
}
every_protocol = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("kind", ALL)


Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def ask(kinds: Path) -> Iterator[Ask]:
    """Sends a body to a protocol of the server for a kind of answer, which has one model and starts when needed.

    Or to that of a guard, which flags blame.
    """
    running = dict[str, Server]()
    with ExitStack() as stack:

        def send(case: Case, kind: str, body: Any) -> httpx.Response:
            options = GUARDS.get(kind, {})
            name = "tiny-int8" if kind == "classes" or options else kind
            if kind not in running:
                one = serving(kinds, models=[name], default_model=name, max_texts=MOST, **options)
                running[kind] = stack.enter_context(one)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            return httpx.post(running[kind].url + case.path.format(model=name), content=content)

        yield send


def with_options(case: Case, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    return body | ({case.options: options} if case.options else options)


def refused(case: Case, answer: httpx.Response, status: int = 422) -> str:
    """The message of an error, which has the protocol's form."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == case.error
    return case.message(answer.json())


@every_kind
@every_protocol
def test_each_text_gets_its_answer_in_order_whatever_is_sent_beside_it(
    ask: Ask, case: Case, kind: str
) -> None:
    answer = ask(case, kind, case.body(TEXTS))
    if kind not in case.kinds:
        assert refused(case, answer).startswith("model: "), answer.text
        return
    assert answer.status_code == 200, answer.text
    if case.answers is not None:
        alone = [case.answers(ask(case, kind, case.body([text])).json()) for text in TEXTS]
        assert [[row] for row in case.answers(answer.json())] == alone


@every_protocol
def test_the_number_of_texts_is_limited(ask: Ask, case: Case) -> None:
    for count, status in ((1, 200), (MOST, 200), (MOST + 1, 422)):
        answer = ask(case, "classes", case.body(["good"] * count))
        assert answer.status_code == status, answer.text
    assert refused(case, answer).startswith(f"{case.texts}: {MOST + 1} texts; at most {MOST}")


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a", ""], "must not be empty"),
        (["a", " \n"], "must not be only white space"),
        (["a", "\u200b\ufeff "], "must not be only white space or invisible characters"),
        (["a", 1], "must be a text"),
        ([], ""),
        (1, ""),
        (ABSENT, "is required"),
    ],
    ids=str,
)
@every_protocol
def test_errors_name_the_text(ask: Ask, case: Case, texts: Any, says: str) -> None:
    answer = ask(case, "classes", {} if texts == ABSENT else case.body(texts))
    if case.optional and (texts in ([], ABSENT) or says.startswith("must not be")):
        assert answer.status_code == 200
        return
    name = case.one.format(1) if says.startswith("must") else case.texts
    if texts == ABSENT:
        name = case.required or name
    elif texts == 1:
        name = name.partition(":")[0]
    assert refused(case, answer).startswith(f"{name}: {says}")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tau": 2}, "tau"),
        ({"tua": 0.1}, "tua"),
        ({"tau": 0, "target_speedup": 2}, "target_speedup"),
        ({"latency_budget_ms": 0}, "latency_budget_ms"),
        ({"max_layer": 99, "tau": 0}, "max_layer"),
    ],
    ids=str,
)
@every_protocol
def test_errors_name_the_option(ask: Ask, case: Case, options: dict[str, Any], name: str) -> None:
    answer = ask(case, "classes", with_options(case, case.body(TEXTS), **options))
    assert f"{name}: " in refused(case, answer)


@every_protocol
def test_a_body_that_is_no_object_or_too_large_is_refused(ask: Ask, case: Case) -> None:
    for body in (b"", b"{", b'{"a": "\xff"}', b"[" * 50_000):
        assert refused(case, ask(case, "classes", body), 400)
    for body in (b"[]", b"1"):
        assert refused(case, ask(case, "classes", body), 422)
    assert "1048576 bytes" in refused(case, ask(case, "classes", b"a" * 2**20 + b"a"), 413)


@every_kind
@every_protocol
def test_a_text_with_too_many_tokens_is_truncated_read_in_windows_or_refused(
    ask: Ask, case: Case, kind: str
) -> None:
    if kind not in case.kinds:
        return
    answer = ask(case, kind, case.body(["good", LONG]))
    if case.takes == "whole":
        assert refused(case, answer).startswith(f"{case.one.format(1)}: has 202 tokens; the maximum")
    else:
        assert answer.status_code == 200, answer.text
    if case.no_cut:
        body = with_options(case, case.body(["good", LONG]), **{case.no_cut: False})
        answer = ask(case, kind, body)
        assert refused(case, answer).startswith(f"{case.one.format(1)}: has 202 tokens; the maximum")
    if case.takes == "windows":
        answer = ask(case, kind, case.body(["good", LONG * 30]))
        assert f"{case.one.format(1)}: has more than" in refused(case, answer)


@every_protocol
def test_a_guard_finds_what_is_behind_the_models_limit(ask: Ask, case: Case) -> None:
    """Unless its operator has it truncate: then the response says so. A protocol's option to truncate is not obeyed."""
    texts = [LONG + "a good film", LONG + "a dull and boring mess , bad and awful " * 4]
    options = {case.cut[0]: case.cut[1]} if case.cut else {}
    for guard, finds, given in (
        ("guard", True, {}),
        ("guard", True, options),
        ("guard that truncates", False, {}),
        ("guard that truncates", False, options),
    ):
        safe, attack = (ask(case, guard, with_options(case, case.body([text]), **given)) for text in texts)
        assert safe.status_code == attack.status_code == 200, attack.text
        said = [one.json() if case.answers is None else case.answers(one.json()) for one in (safe, attack)]
        assert (said[0] != said[1]) == finds
        assert attack.headers.get("de3-truncated") == (None if finds else "0")
    if case.path == "/classify":
        (row,) = said[1]
        assert row["flag"]["flagged"] is None, "its end was not read"
        assert row["truncated"] and LONG[: row["truncated_at"]] == ("good film " * 31)[:-1]


@every_protocol
def test_an_option_sets_the_rule(ask: Ask, case: Case) -> None:
    options: list[dict[str, Any]] = [{"tau": 0}, {"max_layer": 0}]
    answers = [ask(case, "classes", with_options(case, case.body([TEXTS[1]]), **on)).json() for on in options]
    first, full = (one if case.answers is None else case.answers(one) for one in answers)
    assert first != full


def test_refusals_before_a_request_is_read(kinds: Path) -> None:
    """For a wrong key, and above the rate limit."""
    with serving(kinds, models=["tiny-int8"], api_keys=f"alice {KEY}", rate_limit="1/hour") as server:

        def post(path: str, body: Any, key: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.post(server.url + path.format(model="tiny-int8"), json=body, headers=headers)

        def check(status: int, key: str) -> None:
            for case in CASES.values():
                refused(case, post(case.path, case.body(["good"]), key), status)

        check(401, "wrong")
        assert httpx.get(server.url + "/v2/health/ready").status_code == 200
        first = post("/predict", {"inputs": "a"}, KEY)
        assert first.status_code == 200 and "server-timing" in first.headers
        check(429, KEY)
        until(lambda: server.metric("de3_rejected_total", cause="rate_limited") == len(CASES), "the counts")
