"""A server whose model has an upstream, over HTTP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import pytest

from tests.fixtures import make_rows
from tests.serving import Server, until
from tests.upstream import (
    LABELS,
    PROMPT,
    Service,
    chat,
    model_of,
    opinion,
    reply,
    send,
    served,
    service,
    text_of,
)

TEXTS = [text for text, _ in make_rows(60, 77)]
LONG = " ".join(TEXTS)  # several windows of the tiny model


@pytest.fixture(scope="module")
def upstream() -> Iterator[Service]:
    with service(opinion) as running:
        yield running


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, store: Path, encoder: Path, upstream: Service
) -> Iterator[Server]:
    """A server of four models with the same upstream."""
    folder = tmp_path_factory.mktemp("upstream")
    other = {**chat(upstream.url), "kind": "classify", "prompt": None}
    pairs = chat(upstream.url, prompt=f"First: {{text_pair}}\n{PROMPT}")
    models = [
        model_of(folder, LABELS, chat(upstream.url)),
        model_of(folder, LABELS[::-1], other, name="mood"),
        model_of(folder, LABELS[::2], chat(upstream.url), name="bare", encoder=str(encoder)),
        model_of(folder, LABELS, pairs, name="pairs"),
    ]
    with served(folder, store, *models) as running:
        yield running


@pytest.fixture(autouse=True)
def as_before(upstream: Service) -> None:
    """Forgets the requests of earlier tests, and restores the shared upstream's behaviour."""
    upstream.requests.clear()
    upstream.answer, upstream.respond = opinion, None


def rows_of(server: Server, **body: Any) -> list[dict[str, Any]]:
    response = server.classify(**body)
    assert response.status_code == 200, response.text
    return list(response.json()["data"])


def error_of(server: Server, status: int, **body: Any) -> tuple[dict[str, Any], httpx.Headers]:
    response = server.classify(**body)
    assert response.status_code == status, response.text
    return dict(response.json()["error"]), response.headers


def test_an_answer_of_the_upstream(server: Server, upstream: Service) -> None:
    answer = server.described(input=TEXTS[0], tau=0, explain=True)
    (row,) = answer["data"]
    assert row["label"] == opinion(TEXTS[0])
    assert row["probs"] == [float(label == row["label"]) for label in LABELS]
    exit = row["exit"]
    assert (exit["layer"], exit["num_layers"], exit["reason"]) == (3, 3, "upstream")
    layers = row["layers"]
    assert [one["layer"] for one in layers] == [0, 1, 2, 3, 3]
    assert (layers[-1]["label"], layers[-1]["probs"]) == (row["label"], row["probs"])
    assert all(one["probs"][1] == 0 for one in layers[:-1])  # the exits do not know this label
    assert upstream.texts == TEXTS[:1]


def test_another_de3_may_be_the_upstream(tmp_path: Path, store: Path, server: Server) -> None:
    of = chat(
        f"{server.url}/classify", kind="classify", model="tickets", prompt=None, parameters={"tau": 0.5}
    )
    with served(tmp_path, store, model_of(tmp_path, LABELS, of)) as below:
        rows, above = rows_of(below, input=TEXTS, tau=0), rows_of(server, input=TEXTS, tau=0.5)
        assert {row["exit"]["reason"] for row in rows} == {"upstream"}
        assert [(row["label"], row["probs"]) for row in rows] == [
            (one["label"], one["probs"]) for one in above
        ]


def test_a_list_goes_up_as_far_as_no_exit_is_sure(server: Server, upstream: Service) -> None:
    scores = sorted(row["layers"][2]["score"] for row in rows_of(server, input=TEXTS, tau=0, explain=True))
    upstream.requests.clear()
    for tau, least, most in ((0.5, 0, 0), (scores[30], 5, 55)):
        rows = rows_of(server, input=TEXTS, tau=tau, explain=True)
        above = [text for text, row in zip(TEXTS, rows, strict=True) if row["exit"]["reason"] == "upstream"]
        assert least <= len(above) <= most
        assert sorted(upstream.texts) == sorted(above)
        # The exits are those of a model whose labels are in another order.
        assert [row["label"] for row in rows] == [opinion(text) for text in TEXTS]
        assert {row["exit"]["reason"] for row in rows} <= {"threshold", "upstream"}
        assert all(len(row["layers"]) == 5 or row["exit"]["reason"] == "threshold" for row in rows)


def test_options(server: Server, upstream: Service) -> None:
    for layer in (0, 3):
        (row,) = rows_of(server, input=TEXTS[0], max_layer=layer)
        assert row["exit"]["reason"] == ("max_layer" if layer < 3 else "last_layer")
        assert row["exit"]["layer"] == layer
    error = error_of(server, 422, input=TEXTS[0], target_speedup=2)[0]
    assert error["param"] == "target_speedup" and "upstream" in error["message"]
    bare = ({"tau": 0.1}, {"max_layer": 3}, {"max_layer": 1, "tau": 0}, {"latency_budget_ms": 1000})
    for option in bare:
        error, _ = error_of(server, 422, input=TEXTS[0], model="bare", **option)
        assert error["param"] == next(iter(option))
        assert error["message"].endswith("bare:1 has no exits yet, so only its upstream answers")
    for second in ("tickets", {"model": "tickets:1", "tau": 0.5}):
        error, _ = error_of(server, 422, models=["tickets", second], input=TEXTS[0])
        assert error["message"] == "models[1]: tickets, which has an upstream, is already models[0]"
    assert upstream.requests == []
    assert rows_of(server, input=TEXTS[0])[0]["exit"]["reason"] == "upstream"  # nothing is proved yet
    for option in ({}, {"tau": 0}):
        rows = rows_of(server, input=TEXTS[:5], model="bare", explain=True, **option)
        assert [row["label"] for row in rows] == [opinion(text) for text in TEXTS[:5]]
        assert all(row["exit"]["reason"] == "upstream" for row in rows)
        assert all([one["layer"] for one in row["layers"]] == [3, 3] for row in rows)


def test_pairs(server: Server, upstream: Service) -> None:
    pair = {"text": TEXTS[0], "text_pair": "the {text} of the pair"}
    (row,) = rows_of(server, input=pair, model="pairs", tau=0)
    assert row["exit"]["reason"] == "upstream"
    (body,) = upstream.requests
    assert body["messages"][0]["content"].startswith(
        "First: the {text} of the pair\nWhich of positive, mixed"
    )
    assert upstream.texts == TEXTS[:1]
    assert error_of(server, 422, input=TEXTS[0], model="pairs")[0]["param"] == "input"
    assert error_of(server, 422, input=pair)[0]["param"] == "input"
    row = {"label": "mixed", "probs": [0.1, 0.8, 0.1]}
    upstream.respond = lambda handler, _: send(handler, {"data": [row]})
    assert rows_of(server, input=pair, model="mood", tau=0)[0]["probs"] == row["probs"]
    assert upstream.requests[-1]["input"] == pair


def test_a_long_text_goes_up_whole_and_once(server: Server, upstream: Service) -> None:
    for windows in ({"long": "windows"}, {}):  # without, one window is read, all of it sent
        (row,) = rows_of(server, input=LONG, tau=0, **windows)
        assert (row["label"], row["exit"]["reason"]) == (opinion(LONG), "upstream")
        assert upstream.texts == [LONG]
        upstream.requests.clear()
    assert rows_of(server, input=LONG, long="windows", tau=1)[0]["exit"]["reason"] == "threshold"
    assert upstream.requests == []
    upstream.answer = lambda _: "mixed"
    (row,) = server.described(input=LONG, long="windows", tau=0, flag="mixed")["data"]
    assert row["flag"] == {"label": "mixed", "prob": 1.0, "flagged": True}  # no window decided it
    text = "not good bad not " * 15 + "lovely superb " * 30  # the exits are sure of the end only
    (row,) = rows_of(server, input=text, long="windows", tau=0, explain=True)
    scores: dict[int, float] = {}
    for one in row["layers"][:-1]:
        if one["score"] is not None:
            scores[one["window"]] = min(one["score"], scores.get(one["window"], 1.0))
    least, most = scores[row["windows"]["run"] - 1], max(scores.values())
    assert least < most / 2
    upstream.requests.clear()
    (row,) = rows_of(server, input=text, long="windows", tau=(least * most) ** 0.5)
    assert row["windows"]["layers"][-1] < 3
    assert row["exit"]["reason"] == "upstream"
    assert upstream.texts == [text]


def test_two_models_answer_on_one_pass(server: Server, upstream: Service) -> None:
    def respond(handler: Any, body: dict[str, Any]) -> None:
        is_mood = "input" in body
        send(handler, {"data": [{"label": "mixed"}]} if is_mood else reply(opinion(text_of(body))))

    upstream.respond = respond
    for tau, reason in ((1, "threshold"), (0, "upstream")):
        upstream.requests.clear()
        both = [{"model": "tickets", "tau": 0}, {"model": "mood", "tau": tau}]
        first, second = server.described(input=TEXTS[:3], models=both)["results"]
        assert [row["exit"]["reason"] for row in first["data"] + second["data"]] == 3 * ["upstream"] + 3 * [
            reason
        ]
        assert [row["label"] for row in first["data"]] == list(map(opinion, TEXTS[:3]))
        assert sorted(upstream.texts) == sorted(TEXTS[:3] * (1 + (tau == 0)))
    assert [row["label"] for row in second["data"]] == ["mixed"] * 3


def test_a_text_without_an_answer_is_named(server: Server, upstream: Service) -> None:
    upstream.answer = lambda text: "nothing that I know" if text == TEXTS[1] else opinion(text)
    error, headers = error_of(server, 502, input=TEXTS[:3], tau=0)
    assert (error["type"], error["param"]) == ("BadGatewayError", "input[1]")
    assert error["message"].startswith("input[1]: tickets: its upstream failed: its reply names no label")
    assert "retry-after" not in headers  # it would not help
    assert upstream.texts.count(TEXTS[1]) == 2
    upstream.answer = opinion
    upstream.requests.clear()
    assert [row["label"] for row in rows_of(server, input=TEXTS[:3], tau=0)] == list(map(opinion, TEXTS[:3]))
    assert upstream.texts == [TEXTS[1]]  # the others were paid for
    rows_of(server, input=TEXTS[:3], tau=0)
    assert sorted(upstream.texts) == sorted([TEXTS[1], *TEXTS[:3]])
    replies = iter(["hm", "The answer is positive."])
    upstream.answer = lambda _: next(replies)
    assert rows_of(server, input=TEXTS[1], tau=0)[0]["label"] == "positive"
    assert server.metric("de3_upstream_calls_total", model="tickets", kind="retry") == 2
    assert server.metric("de3_upstream_extracted_total", model="tickets") == 1
    assert server.metric("de3_upstream_failures_total", model="tickets", reason="reply") == 3


def test_without_its_upstream_a_model_with_exits_answers_if_the_settings_allow_it(
    tmp_path: Path, store: Path, encoder: Path
) -> None:
    def failed() -> None:
        """An answer of the model with exits."""
        (row,) = server.described(input=TEXTS[0], tau=0)["data"]
        assert (row["exit"]["reason"], row["exit"]["layer"]) == ("upstream_failed", 3)
        assert row["label"] == opinion(TEXTS[0])

    def is_paused() -> bool:
        response = server.classify(input=TEXTS[0], model="bare")
        is_available = server.metric("de3_upstream_available", model="bare")
        return "cannot be asked: its last calls have failed" in response.text and not is_available

    with service(opinion) as upstream:
        models = [
            model_of(tmp_path, LABELS, chat(upstream.url, timeout_s=0.2)),
            model_of(tmp_path, LABELS, chat(upstream.url, timeout_s=0.2), name="bare", encoder=str(encoder)),
        ]
        with served(tmp_path, store, *models, without_upstream="answer", audit_share=0.5) as server:
            upstream.gate.clear()
            failed()
            error, headers = error_of(server, 504, input=TEXTS[0], model="bare")
            assert error["type"] == "TimeoutError" and int(headers["retry-after"]) >= 1
            assert server.metric("de3_upstream_available", model="bare") == 1
            upstream.is_broken = True
            upstream.gate.set()
            failed()
            error, headers = error_of(server, 502, input=TEXTS[0], model="bare")
            assert "its upstream failed: it answers with HTTP 503" in error["message"]
            assert int(headers["retry-after"]) >= 1
            until(is_paused, "a pause of the calls")
            assert server.metric("de3_upstream_failures_total", model="bare", reason="timeout") == 3
            report = httpx.get(f"{server.url}/v1/models/tickets/audit").json()
            assert (report["excluded"]["upstream_failed"], report["texts"]) == (2, 0)
            assert rows_of(server, input=TEXTS[:20], tau=1)  # the exits still answer
            upstream.is_broken = False
            until(lambda: server.classify(input=TEXTS[0], model="bare").status_code == 200, "its recovery")
            assert server.metric("de3_upstream_available", model="bare") == 1


def test_a_budget_that_is_shorter_than_a_call(tmp_path: Path, store: Path) -> None:
    upstream_s = 0.3

    def slow(text: str) -> str:
        sleep(upstream_s)
        return opinion(text)

    with service(slow) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, audit_share=0.5) as server:
            for budget_ms, reason in ((5000, "upstream"), (200, "deadline"), (5000, "upstream")):
                (row,) = rows_of(server, input=TEXTS[0], latency_budget_ms=budget_ms)
                assert (row["exit"]["reason"], row["label"]) == (reason, opinion(TEXTS[0]))
            report = httpx.get(f"{server.url}/v1/models/tickets/audit").json()
            assert report["excluded"]["deadline"] == 1
            assert report["upstream"]["usual_latency_s"] >= upstream_s
            assert len(upstream.requests) == 2
            upstream_s = 2.0  # slower than usual
            (row,) = rows_of(server, input=TEXTS[0], latency_budget_ms=600)
            assert row["exit"]["reason"] == "deadline"


def test_a_client_shares_neither_its_answers_nor_the_room_of_others(tmp_path: Path, store: Path) -> None:
    """A client may have as many texts waiting for an upstream as in the queue, which is shared.

    What the calls of all clients cost is for the administrator.
    """
    keys = "\n".join(f"{letter} {letter * 20}" for letter in "ab")
    limits: dict[str, Any] = {"api_keys": keys, "max_queue": 64, "max_texts": 64, "guarantee": 0.1}
    limits |= {"admin_keys": "c " + 20 * "c"}
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url, concurrency=2))
        with served(tmp_path, store, of, **limits) as server, ThreadPoolExecutor(2) as pool:
            waiting = server.service.admission.waiting

            def post(client: str, texts: list[str], tau: float = 0) -> httpx.Response:
                headers = {"Authorization": f"Bearer {client * 20}"}
                body = {"input": texts, "tau": tau}
                return httpx.post(f"{server.url}/classify", json=body, headers=headers, timeout=60)

            upstream.answer = lambda text: "nothing that I know" if text == TEXTS[1] else opinion(text)
            assert post("a", TEXTS[:2]).status_code == 502
            upstream.requests.clear()
            for client in "ba":  # a call for b, and none for a, which has paid for it
                assert post(client, TEXTS[:1]).status_code == 200
                assert upstream.texts == [TEXTS[0]]
            for client, sees_all in (("a", False), ("c", True)):
                headers = {"Authorization": f"Bearer {client * 20}"}
                report = httpx.get(f"{server.url}/v1/models/tickets/audit", headers=headers).json()
                assert ("upstream" in report, "tenants" in report) == (sees_all, True)
            upstream.answer = opinion
            upstream.gate.clear()
            many = pool.submit(post, "a", (TEXTS + TEXTS)[:64])
            until(lambda: waiting.total == 64, "the texts to wait")
            assert server.service.admission.texts.total == 0  # the engine does not wait
            refused = post("a", TEXTS[:1])
            assert refused.status_code == 503
            assert "overloaded: 64 texts for an upstream are in flight" in refused.json()["error"]["message"]
            other = pool.submit(post, "b", TEXTS[:1])
            until(lambda: waiting.total == 65, "the text of another client")
            assert post("a", TEXTS, tau=0.5).status_code == 200  # these do not wait
            upstream.gate.set()
            assert many.result().status_code == other.result().status_code == 200
            assert waiting.total == 0
