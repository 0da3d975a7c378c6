"""vLLM's semantic router: its requests, and its checks of the answers, for each contract of `http_classify`.

As in src/semantic-router/pkg (commits 140b97d9 and 174d2bcb): classification/http_classifier.go,
complexity_remote_backend.go and http_token_classifier.go, and modelruntime/connector/.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.export.classifier import Stock, convert
from de3.model_store.store import Store
from tests.fixtures import made_once, save_encoder
from tests.serving import Server, serving
from tests.test_span_doors import NOTHING, TEXT, finders

KEY = "a-key-of-the-router"
HEADERS = dict.fromkeys(("Content-Type", "Accept"), "application/json") | {"Authorization": f"Bearer {KEY}"}
LABELS = ["negative", "positive"]  # of the router's mapping
ENTITIES = {"PERSON", "CITY"}  # without O, which the router refuses
BEHIND = f"{NOTHING} " * 60  # more tokens than the model's limit
TEXTS = {
    "ASCII": "a dull plot",
    "escaped": '<b>good</b> & "dull" \\ \u2028 \t\x7f\x00 warm',
    "emoji": TEXT,
    "other scripts": "שלום é e\u0301 film 好的 👩‍👩‍👧 good, \U00020000 dull \ufffd",
    "long": BEHIND + "😀 it was dull",
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


@pytest.fixture(scope="module")
def servers(store: Path) -> Iterator[dict[str, Server]]:
    """A server for each contract, because requests name no model."""

    def scorer(folder: Path) -> None:
        stock = Stock.open("stock", save_encoder(folder / ".stock", labels=1))
        convert(stock, Store(folder), "scorer", "int8")

    key: dict[str, Any] = {"api_keys": f"router {KEY}"}
    with (
        serving(store, models=["tiny-int8"], **key) as distribution,
        serving(store, models=["tiny-int8"], flags=["positive"], tau=0, **key) as guard,
        serving(made_once("router-scorer", scorer), **key) as score,
        serving(finders(store), models=["finder"], **key) as spans,
    ):
        yield {"distribution": distribution, "guard": guard, "score": score, "spans": spans}


def asked(server: Server, text: str, field: str = "inputs") -> httpx.Response:
    """The response to a request, whose body is written as Go's json.Marshal does."""
    body = json.dumps({field: text}, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        body = body.replace(char, f"\\u{ord(char):04x}")
    return httpx.post(f"{server.url}/classify", content=body.encode(), headers=HEADERS)


def listed(server: Server, text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that the router reads, and the answer in our own format."""
    answer = asked(server, text)
    assert answer.status_code == 200 and len(answer.content) <= 2**20, answer.text
    rows = json.loads(answer.content, parse_constant=pytest.fail)  # Go reads no NaN
    assert isinstance(rows, list)
    return rows, asked(server, text, "input").json()["data"][0]


@every_text
@pytest.mark.parametrize("name", ["distribution", "guard"])
def test_label_distribution(servers: dict[str, Server], name: str, text: str) -> None:
    """Each label of the router's mapping once, in any order, and no other one; scores sum to 1."""
    rows, ours = listed(servers[name], text)
    scores = {row["label"]: row["score"] for row in rows}
    assert len(rows) == len(LABELS) and scores.keys() == set(LABELS)
    assert all(0 <= score <= 1 for score in scores.values()) and abs(sum(scores.values()) - 1) <= 0.02
    assert [scores[label] for label in LABELS] == ours["probs"]


@every_text
def test_score(servers: dict[str, Server], text: str) -> None:
    (row,), ours = listed(servers["score"], text)
    assert isinstance(row["label"], str) and math.isfinite(row["score"])
    assert row["score"] == pytest.approx(ours["value"], abs=1e-6)


@every_text
def test_token_spans(servers: dict[str, Server], text: str) -> None:
    """Offsets count code points, and the end is exclusive; spans may overlap, in any order, but not be equal."""
    rows, ours = listed(servers["spans"], text)
    for row in rows:
        assert row["entity_group"] in ENTITIES and 0 <= row["score"] <= 1
        assert type(row["start"]) is type(row["end"]) is int and 0 <= row["start"] < row["end"] <= len(text)
        assert row["word"] == text[row["start"] : row["end"]]
    assert len({(row["entity_group"], row["start"], row["end"]) for row in rows}) == len(rows) > 0
    assert [(row["start"], row["score"]) for row in rows] == [(s["start"], s["score"]) for s in ours["spans"]]
    assert asked(servers["spans"], NOTHING).json() == []


def test_a_text_is_truncated_only_without_a_flag_and_refused_beyond_its_windows(
    servers: dict[str, Server],
) -> None:
    """The router cannot see that a text was truncated."""
    attack = "a dull and boring mess , bad and awful " * 4
    for name, finds in (("distribution", False), ("guard", True)):
        best = [asked(servers[name], BEHIND + end).json()[0]["label"] for end in ("", attack)]
        assert best == ["negative", "positive" if finds else "negative"], name
    for name, status in (("distribution", 200), ("score", 200), ("guard", 422), ("spans", 422)):
        assert asked(servers[name], BEHIND * 10).status_code == status, name
    for text in (" ", "\n"):  # the router does not ask about an empty text
        assert {asked(server, text).status_code for server in servers.values()} == {422}
