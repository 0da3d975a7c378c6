"""A server whose model has an upstream, over HTTP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import pytest

from de3.server.service import Service as Serving
from de3.server.settings import Settings
from de3.server.upstream.breaker import FAILURES
from tests.fixtures import make_rows
from tests.serving import Server, serving, until, waiting_client
from tests.upstream import (
    KEY,
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
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forgets the requests of earlier tests, and restores the shared upstream's behaviour."""
    if "upstream" in request.fixturenames:
        upstream = request.getfixturevalue("upstream")
        upstream.requests.clear()
        yield
        upstream.answer, upstream.respond, upstream.is_broken = opinion, None, False
        upstream.gate.set()
    else:
        yield


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
    assert (row["exit"]["layer"], row["exit"]["num_layers"]) == (3, 3)
    assert row["exit"]["reason"] == "upstream"
    layers = row["layers"]
    assert [one["layer"] for one in layers] == [0, 1, 2, 3, 3]
    assert (layers[-1]["label"], layers[-1]["probs"]) == (row["label"], row["probs"])
    assert all(one["probs"][1] == 0 for one in layers[:-1])  # the exits do not know this label
    assert upstream.texts == TEXTS[:1]


def test_the_exits_of_the_store_answer_with_labels_in_another_order(
    server: Server, upstream: Service, store: Path
) -> None:
    rows = rows_of(server, input=TEXTS, tau=0.5)
    assert upstream.requests == []
    assert all(row["exit"]["reason"] == "threshold" for row in rows)
    with_exits = Serving(Settings(store=store, models=["tiny"])).artifacts[0].manifest
    assert with_exits.labels == ["negative", "positive"]
    assert sum(row["label"] == opinion(text) for text, row in zip(TEXTS, rows, strict=True)) == 60


def test_another_de3_may_be_the_upstream(tmp_path: Path, store: Path) -> None:
    labels = ["negative", "positive"]
    with serving(store, models=["tiny"]) as other:
        url = f"{other.url}/classify"
        fields = {"kind": "classify", "model": "tiny", "prompt": None, "parameters": {"tau": 0}}
        with served(tmp_path, store, model_of(tmp_path, labels, chat(url, **fields))) as server:
            rows = rows_of(server, input=TEXTS, tau=0)
            assert {row["exit"]["reason"] for row in rows} == {"upstream"}
            above = rows_of(other, input=TEXTS, tau=0)
            assert [row["probs"] for row in rows] == [row["probs"] for row in above]
            assert [row["label"] for row in rows] == [row["label"] for row in above]


def test_a_list_goes_up_as_far_as_no_exit_is_sure(server: Server, upstream: Service) -> None:
    scores = sorted(row["layers"][2]["score"] for row in rows_of(server, input=TEXTS, tau=0, explain=True))
    upstream.requests.clear()
    rows = rows_of(server, input=TEXTS, tau=scores[30], explain=True)
    above = [text for text, row in zip(TEXTS, rows, strict=True) if row["exit"]["reason"] == "upstream"]
    assert 5 < len(above) < 55
    assert sorted(upstream.texts) == sorted(above)
    assert [row["label"] for row in rows] == [opinion(text) for text in TEXTS]
    assert {row["exit"]["reason"] for row in rows} == {"threshold", "upstream"}
    for row in rows:
        assert len(row["layers"]) == 5 or row["exit"]["reason"] == "threshold"


def test_options(server: Server, upstream: Service) -> None:
    for layer in range(4):
        (row,) = rows_of(server, input=TEXTS[0], max_layer=layer)
        assert row["exit"]["reason"] == ("max_layer" if layer < 3 else "last_layer")
        assert row["exit"]["layer"] == layer
    assert upstream.requests == []
    error, _ = error_of(server, 422, input=TEXTS[0], target_speedup=2)
    assert error["param"] == "target_speedup"
    assert "upstream" in error["message"]
    assert rows_of(server, input=TEXTS[0])[0]["exit"]["reason"] == "upstream"  # nothing is proved yet


def test_an_encoder_without_exits(server: Server, upstream: Service) -> None:
    for option in (
        {"tau": 0.1},
        {"max_layer": 1},
        {"max_layer": 3},
        {"max_layer": 1, "tau": 0},
        {"latency_budget_ms": 1000},
        {"target_speedup": 2},
    ):
        error, _ = error_of(server, 422, input=TEXTS[0], model="bare", **option)
        assert error["param"] == next(iter(option))
        assert error["message"].endswith("bare:1 has no exits yet, so only its upstream answers")
    assert upstream.requests == []
    for option in ({}, {"tau": 0}):
        rows = rows_of(server, input=TEXTS[:5], model="bare", explain=True, **option)
        assert [row["label"] for row in rows] == [opinion(text) for text in TEXTS[:5]]
        assert all(row["exit"]["reason"] == "upstream" for row in rows)
        assert all([one["layer"] for one in row["layers"]] == [3, 3] for row in rows)
    assert len(upstream.requests) == 10


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
    upstream.respond = lambda handler, body: send(
        handler, {"data": [{"label": "mixed", "probs": [0.1, 0.8, 0.1]}]}
    )
    (row,) = rows_of(server, input=pair, model="mood", tau=0)
    assert upstream.requests[-1]["input"] == pair
    assert row["probs"] == [0.1, 0.8, 0.1]


def test_a_long_text_goes_up_whole_and_once(server: Server, upstream: Service) -> None:
    (row,) = rows_of(server, input=LONG, long="windows", tau=0, explain=True)
    assert upstream.texts == [LONG]
    assert (row["label"], row["exit"]["reason"]) == (opinion(LONG), "upstream")
    upstream.requests.clear()
    assert (
        rows_of(server, input=LONG, tau=0)[0]["exit"]["reason"] == "upstream"
    )  # one window is read, all of it sent
    assert upstream.texts == [LONG]
    upstream.requests.clear()
    (row,) = rows_of(server, input=LONG, long="windows", tau=1)
    assert row["exit"]["reason"] == "threshold"
    assert upstream.requests == []
    upstream.answer = lambda _: "mixed"
    (row,) = server.described(input=LONG, long="windows", tau=0, flag="mixed")["data"]
    assert row["flag"] == {"label": "mixed", "prob": 1.0, "flagged": True}  # no window decided it


def test_a_long_text_goes_up_if_no_exit_is_sure_of_one_window(server: Server, upstream: Service) -> None:
    text = "not good bad not " * 15 + "lovely superb " * 30
    (row,) = rows_of(server, input=text, long="windows", tau=0, explain=True)
    scores = [
        min(
            one["score"] for one in row["layers"][:-1] if one["window"] == window and one["score"] is not None
        )
        for window in range(row["windows"]["run"])
    ]
    least, most = scores[-1], max(scores)
    assert least < most / 2
    upstream.requests.clear()
    (row,) = rows_of(server, input=text, long="windows", tau=(least * most) ** 0.5)
    assert row["windows"]["layers"][-1] < 3
    assert row["exit"]["reason"] == "upstream"
    assert upstream.texts == [text]


def test_two_models_answer_on_one_pass(server: Server, upstream: Service) -> None:
    def respond(handler: Any, body: dict[str, Any]) -> None:
        if "input" in body:
            send(handler, {"data": [{"label": "mixed"}]})
        else:
            send(handler, reply(opinion(text_of(body))))

    upstream.respond = respond
    both = [{"model": "tickets", "tau": 0}, {"model": "mood", "tau": 1}]
    first, second = server.described(input=TEXTS[:3], models=both)["results"]
    assert [row["exit"]["reason"] for row in first["data"]] == ["upstream"] * 3
    assert [row["exit"]["reason"] for row in second["data"]] == ["threshold"] * 3
    assert sorted(upstream.texts) == sorted(TEXTS[:3])
    upstream.requests.clear()
    first, second = server.described(input=TEXTS[:3], models=["tickets", "mood"], tau=0)["results"]
    assert [row["label"] for row in first["data"]] == list(map(opinion, TEXTS[:3]))
    assert [row["label"] for row in second["data"]] == ["mixed"] * 3
    assert sorted(upstream.texts) == sorted(2 * TEXTS[:3])


def test_a_text_without_an_answer_is_named(server: Server, upstream: Service) -> None:
    upstream.answer = lambda text: "nothing that I know" if text == TEXTS[1] else opinion(text)
    error, headers = error_of(server, 502, input=TEXTS[:3], tau=0)
    assert error["type"] == "BadGatewayError"
    assert error["param"] == "input[1]"
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
    metric = server.metric("de3_upstream_calls_total", model="tickets", kind="retry")
    assert metric == 2
    assert server.metric("de3_upstream_extracted_total", model="tickets") == 1
    assert server.metric("de3_upstream_failures_total", model="tickets", reason="reply") == 3


def test_a_refused_text_is_no_outage(server: Server, upstream: Service) -> None:
    upstream.respond = lambda handler, _: send(handler, {"error": KEY}, 400)
    for _ in range(6):
        error, headers = error_of(server, 502, input=TEXTS[0], tau=0)
        assert error["message"] == "input: tickets: its upstream failed: it answers with HTTP 400"
        assert "retry-after" not in headers
    assert len(upstream.requests) == 6
    upstream.respond = None
    assert rows_of(server, input=TEXTS[0], tau=0)


def test_a_client_that_goes_stops_its_call(server: Server, upstream: Service) -> None:
    upstream.gate.clear()
    caller = server.service.shared.upstreams.all["tickets"]  # type: ignore[attr-defined]
    with waiting_client(server.url, input=TEXTS[0], tau=0):
        until(lambda: upstream.running == 1, "the call")
    until(lambda: caller._texts_room.total == 0, "the call to end")


@pytest.mark.parametrize("mode", ["refuse", "answer"])
def test_without_its_upstream(tmp_path: Path, store: Path, encoder: Path, mode: str) -> None:
    with service(opinion) as upstream:
        models = [
            model_of(tmp_path, LABELS, chat(upstream.url, timeout_s=0.2)),
            model_of(tmp_path, LABELS, chat(upstream.url), name="bare", encoder=str(encoder)),
        ]
        with served(tmp_path, store, *models, without_upstream=mode, audit_share=0.5) as server:
            upstream.is_broken = True
            error, headers = error_of(server, 502, input=TEXTS[0], model="bare")
            assert "its upstream failed: it answers with HTTP 503" in error["message"]
            assert int(headers["retry-after"]) >= 1
            response = server.classify(input=TEXTS[0], tau=0)
            if mode == "refuse":
                assert response.status_code == 502
                assert int(response.headers["retry-after"]) >= 1
            else:
                (row,) = response.json()["data"]
                assert (row["exit"]["reason"], row["exit"]["layer"]) == ("upstream_failed", 3)
                assert row["label"] == opinion(TEXTS[0])
                server.described(input=TEXTS[0])
            upstream.is_broken = False
            upstream.gate.clear()
            response = server.classify(input=TEXTS[0], tau=0)
            if mode == "refuse":
                assert response.status_code == 504
                assert response.json()["error"]["type"] == "TimeoutError"
                assert int(response.headers["retry-after"]) >= 1
            else:
                assert response.json()["data"][0]["exit"]["reason"] == "upstream_failed"
                report = httpx.get(f"{server.url}/v1/models/tickets/audit").json()
                assert report["excluded"]["upstream_failed"] == 3
                assert report["texts"] == 0
            upstream.gate.set()
            assert rows_of(server, input=TEXTS[:20], tau=1)  # the exits still answer


def test_a_budget_that_is_shorter_than_a_call(tmp_path: Path, store: Path) -> None:
    upstream_s = 0.3

    def slow(text: str) -> str:
        sleep(upstream_s)
        return opinion(text)

    with service(slow) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, audit_share=0.5) as server:
            assert rows_of(server, input=TEXTS[0], tau=0)[0]["exit"]["reason"] == "upstream"
            for count in range(1, 4):
                (row,) = rows_of(server, input=TEXTS[0], latency_budget_ms=200)
                assert row["exit"]["reason"] == "deadline"
                assert row["label"] == opinion(TEXTS[0])
                report = httpx.get(f"{server.url}/v1/models/tickets/audit").json()
                assert report["excluded"]["deadline"] == count
            assert len(upstream.requests) == 1
            assert report["upstream"]["usual_latency_s"] >= upstream_s
            (row,) = rows_of(server, input=TEXTS[0], latency_budget_ms=5000)
            assert row["exit"]["reason"] == "upstream"
            upstream_s = 1.0  # slower than usual
            for _ in range(FAILURES + 1):
                (row,) = rows_of(server, input=TEXTS[0], latency_budget_ms=400)
                assert row["exit"]["reason"] == "deadline"
            assert rows_of(server, input=TEXTS[0], tau=0)[0]["exit"]["reason"] == "upstream"  # it is not away


def test_calls_are_paused_while_the_upstream_is_away(
    tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of) as server:
            upstream.is_broken = True
            statuses = [server.classify(input=TEXTS[0], tau=0).status_code for _ in range(5)]
            assert statuses == [502] * 5
            seen = len(upstream.requests)
            assert seen == FAILURES
            assert server.metric("de3_upstream_available", model="tickets") == 0
            error, headers = error_of(server, 502, input=TEXTS[0], tau=0)
            assert error["message"].endswith("its upstream cannot be asked: its last calls have failed")
            assert int(headers["retry-after"]) >= 1
            upstream.is_broken = False
            until(lambda: server.classify(input=TEXTS[0], tau=0).status_code == 200, "its recovery")
            assert len(upstream.requests) == seen + 1
            assert server.metric("de3_upstream_available", model="tickets") == 1
            assert server.metric("de3_upstream_failures_total", reason="server_error") == FAILURES
    assert caplog.text.count("its upstream does not work (it answers with HTTP 503): calls are paused") == 1


def test_no_more_calls_run_at_a_time_than_allowed(tmp_path: Path, store: Path) -> None:
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url, concurrency=3))
        with served(tmp_path, store, of) as server:
            upstream.gate.clear()
            with ThreadPoolExecutor(1) as pool:
                answers = pool.submit(rows_of, server, input=TEXTS, tau=0)
                until(lambda: upstream.running == 3, "three calls")
                upstream.gate.set()
                assert [row["label"] for row in answers.result()] == list(map(opinion, TEXTS))
            assert upstream.most == 3


def test_a_filtered_text_of_one_tenant_does_not_pause_the_calls_of_another(
    tmp_path: Path, store: Path
) -> None:
    keys = "\n".join(f"{letter} {letter * 20}" for letter in "ab")
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, api_keys=keys) as server:

            def post(letter: str, text: str) -> httpx.Response:
                key = {"Authorization": f"Bearer {letter * 20}"}
                return httpx.post(f"{server.url}/classify", json={"input": text, "tau": 0}, headers=key)

            upstream.respond = lambda handler, _: send(handler, reply(None))
            for _ in range(2 * FAILURES):
                refused = post("a", "a filtered text")
                assert refused.status_code == 502
                message = refused.json()["error"]["message"]
                assert message.endswith("its upstream failed: its reply names no label, or several")
            upstream.respond = None
            assert post("b", TEXTS[0]).status_code == 200


def test_an_answer_that_one_tenant_has_paid_for_is_not_given_to_another(tmp_path: Path, store: Path) -> None:
    keys = "\n".join(f"{letter} {letter * 20}" for letter in "ab")
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url))
        with served(tmp_path, store, of, api_keys=keys) as server:

            def status(letter: str, *texts: str) -> int:
                key = {"Authorization": f"Bearer {letter * 20}"}
                content = {"input": texts, "tau": 0}
                return httpx.post(f"{server.url}/classify", json=content, headers=key).status_code

            upstream.answer = lambda text: "nothing that I know" if text == TEXTS[1] else opinion(text)
            assert status("a", *TEXTS[:2]) == 502
            upstream.requests.clear()
            for letter in "ba":  # a call for b, and none for a
                assert status(letter, TEXTS[0]) == 200
                assert upstream.texts == [TEXTS[0]]


def test_a_model_with_an_upstream_answers_once(server: Server, upstream: Service) -> None:
    for second in ("tickets", "tickets:1", {"model": "tickets", "tau": 0.5}):
        error, _ = error_of(server, 422, models=["tickets", second], input=TEXTS[0])
        assert error["message"] == "models[1]: tickets, which has an upstream, is already models[0]"
        assert error["param"] == "models[1]"
    assert upstream.requests == []


def test_a_client_leaves_room_for_others(tmp_path: Path, store: Path) -> None:
    """A client may have as many texts waiting for an upstream as in the queue, which is shared."""
    headers = [{"Authorization": f"Bearer {letter * 20}"} for letter in "ab"]
    keys = "\n".join(f"{letter} {letter * 20}" for letter in "ab")
    limits: dict[str, Any] = {"api_keys": keys, "max_queue": 64, "max_texts": 64}
    with service(opinion) as upstream:
        of = model_of(tmp_path, LABELS, chat(upstream.url, concurrency=2))
        with served(tmp_path, store, of, **limits) as server, ThreadPoolExecutor(2) as pool:

            def post(client: int, texts: list[str]) -> httpx.Response:
                body = {"input": texts, "tau": 0}
                return httpx.post(f"{server.url}/classify", json=body, headers=headers[client], timeout=60)

            upstream.gate.clear()
            many = pool.submit(post, 0, (TEXTS + TEXTS)[:64])
            until(lambda: server.service.admission.waiting.total == 64, "the texts to wait")
            assert server.service.admission.texts.total == 0  # the engine does not wait
            refused = post(0, TEXTS[:1])
            assert refused.status_code == 503
            assert refused.json()["error"]["message"].startswith(
                "overloaded: 64 texts for an upstream are in flight"
            )
            other = pool.submit(post, 1, TEXTS[:1])
            until(lambda: server.service.admission.waiting.total == 65, "the text of another client")
            local = {"input": TEXTS, "tau": 0.5}
            answer = httpx.post(f"{server.url}/classify", json=local, headers=headers[0], timeout=60)
            assert answer.status_code == 200  # these do not wait
            upstream.gate.set()
            assert many.result().status_code == other.result().status_code == 200
            assert server.service.admission.waiting.total == 0
