"""What every protocol promises, whatever a model answers: a test for each promise, with a row for each protocol.

What only one protocol does is in the file of its peers (test_clients.py, test_guards.py, ...).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from tests.doors import ALL, DOORS, Door
from tests.fixtures import made_once, save_encoder
from tests.serving import Server, serving, until
from tests.stock import token_classifier, with_random_exits

TEXTS = ["a good film", "dull and boring", "it is not bad", "the plot"]
KEY = "alice-has-a-long-key"
MOST = 8  # texts of a request
LONG = "good film " * 100
ABSENT = "no texts"
every_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
every_kind = pytest.mark.parametrize("kind", ALL)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A store with a model of each kind of answer, by its name."""

    def make(folder: Path) -> None:
        made = Store(folder)
        shutil.copytree(store / "tiny-int8", folder / "tiny-int8")
        for name, labels, problem in (
            ("labels", 3, "multi_label_classification"),
            ("value", 1, "regression"),
        ):
            source = save_encoder(folder / f".{name}", labels=labels)
            config = json.loads((source / "config.json").read_text()) | {"problem_type": problem}
            (source / "config.json").write_text(json.dumps(config))
            convert(Stock.open("stock", source), made, name, "int8")
        with_random_exits(token_classifier(tmp_path_factory, "bert"), made, "spans", "int8")

    return made_once(tmp_path_factory, "kinds", make)


class Servers:
    """A server for each kind of answer, which has one model; each starts once it is needed."""

    def __init__(self, store: Path) -> None:
        self._store, self._running, self._stack = store, dict[str, Server](), ExitStack()

    def ask(self, door: Door, kind: str, body: Any, **more: Any) -> httpx.Response:
        """The response of a protocol for a model of this kind."""
        name = "tiny-int8" if kind == "classes" else kind
        if kind not in self._running:
            one = serving(self._store, models=[name], default_model=name, max_texts=MOST)
            self._running[kind] = self._stack.enter_context(one)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self._running[kind].url + door.path.format(model=name), content=content, **more)

    def stop(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def servers(kinds: Path) -> Iterator[Servers]:
    running = Servers(kinds)
    yield running
    running.stop()


def with_options(door: Door, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    return body | ({door.options: options} if door.options else options)


def refused(door: Door, answer: httpx.Response, status: int = 422) -> str:
    """The message of an error, which has the protocol's form."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == door.error
    return door.message(answer.json())


@every_kind
@every_door
def test_each_text_gets_its_answer_in_order_whatever_is_sent_beside_it(
    servers: Servers, door: Door, kind: str
) -> None:
    if kind not in door.kinds:
        return assert_refused(servers, door, kind)
    answer = servers.ask(door, kind, door.body(TEXTS))
    assert answer.status_code == 200, answer.text
    if door.answers is None:
        return None
    alone = [door.answers(servers.ask(door, kind, door.body([text])).json()) for text in TEXTS]
    assert [[row] for row in door.answers(answer.json())] == alone
    return None


def assert_refused(servers: Servers, door: Door, kind: str) -> None:
    answer = servers.ask(door, kind, door.body(TEXTS))
    assert refused(door, answer).startswith("model: "), answer.text


@every_door
def test_the_number_of_texts_is_limited(servers: Servers, door: Door) -> None:
    for count, status in ((1, 200), (MOST, 200), (MOST + 1, 422)):
        answer = servers.ask(door, "classes", door.body(["good"] * count))
        assert answer.status_code == status, answer.text
    assert refused(door, answer).startswith(f"{door.texts}: {MOST + 1} texts; at most {MOST}")


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["a", ""], "must not be empty"),
        (["a", " \n"], "must not be only white space"),
        (["a", 1], "must be a text"),
        (["a", None], "must be a text"),
        ([], ""),
        (1, ""),
        (ABSENT, "is required"),
    ],
    ids=str,
)
@every_door
def test_errors_name_the_text(servers: Servers, door: Door, texts: Any, says: str) -> None:
    answer = servers.ask(door, "classes", {} if texts == ABSENT else door.body(texts))
    if door.optional and texts in (["a", ""], ["a", " \n"], [], ABSENT):
        assert answer.status_code == 200
        return
    name = door.one.format(1) if says.startswith("must") else door.texts
    if texts == ABSENT:
        name = door.required or name
    elif texts == 1:
        name = name.partition(":")[0]
    assert refused(door, answer).startswith(f"{name}: {says}")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tau": 2}, "tau"),
        ({"tau": "a"}, "tau"),
        ({"tua": 0.1}, "tua"),
        ({"tau": 0, "target_speedup": 2}, "target_speedup"),
        ({"latency_budget_ms": 0}, "latency_budget_ms"),
        ({"max_disagreement": 2}, "max_disagreement"),
        ({"max_layer": 99, "tau": 0}, "max_layer"),
    ],
    ids=str,
)
@every_door
def test_errors_name_the_option(servers: Servers, door: Door, options: dict[str, Any], name: str) -> None:
    answer = servers.ask(door, "classes", with_options(door, door.body(TEXTS), **options))
    assert f"{name}: " in refused(door, answer)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b'{"a": "\xff"}', 400), (b"[" * 50_000, 400), (b"[]", 422), (b"1", 422)],
    ids=str,
)
@every_door
def test_a_body_that_is_no_object_is_refused(servers: Servers, door: Door, body: bytes, status: int) -> None:
    assert refused(door, servers.ask(door, "classes", body), status)


@every_door
def test_a_body_that_is_too_large_is_refused(servers: Servers, door: Door) -> None:
    assert "1048576 bytes" in refused(door, servers.ask(door, "classes", b"a" * 2**20 + b"a"), 413)


@every_kind
@every_door
def test_a_text_with_too_many_tokens_is_truncated_read_in_windows_or_refused(
    servers: Servers, door: Door, kind: str
) -> None:
    if kind not in door.kinds:
        return
    answer = servers.ask(door, kind, door.body(["good", LONG]))
    if door.takes == "whole":
        assert refused(door, answer).startswith(f"{door.one.format(1)}: has 202 tokens; the maximum")
    else:
        assert answer.status_code == 200, answer.text
    if door.no_cut:
        answer = servers.ask(
            door, kind, with_options(door, door.body(["good", LONG]), **{door.no_cut: False})
        )
        assert refused(door, answer).startswith(f"{door.one.format(1)}: has 202 tokens; the maximum")
    answer = servers.ask(door, kind, door.body(["good", LONG * 30]))
    if door.takes == "windows":
        assert f"{door.one.format(1)}: has more than" in refused(door, answer)


@every_door
def test_an_option_sets_the_rule(servers: Servers, door: Door) -> None:
    answers = [
        servers.ask(door, "classes", with_options(door, door.body([TEXTS[1]]), tau=tau)).json()
        for tau in (0, 1)
    ]
    first, full = (one if door.answers is None else door.answers(one) for one in answers)
    assert first != full


def test_refusals_before_a_request_is_read(kinds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a wrong key, above the rate limit, and while requests are shed."""
    with serving(kinds, models=["tiny-int8"], api_keys=f"alice {KEY}", rate_limit="1/hour") as server:

        def check(status: int, key: str = KEY) -> None:
            for door in DOORS.values():
                url, headers = (
                    server.url + door.path.format(model="tiny-int8"),
                    {"Authorization": f"Bearer {key}"},
                )
                refused(door, httpx.post(url, json=door.body(["good"]), headers=headers), status)

        check(401, "wrong")
        assert httpx.get(server.url + "/v2/health/ready").status_code == 200
        first = httpx.post(
            f"{server.url}/predict", json={"inputs": "a"}, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert first.status_code == 200 and "server-timing" in first.headers
        check(429)
        until(lambda: server.metric("de3_rejected_total", cause="rate_limited") == len(DOORS), "the counts")
        monkeypatch.setattr(server.frontend, "sheds", lambda _: True)
        check(503)
