"""The server end to end: real sockets, real ONNX Runtime, answers checked against the plain full model."""

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.client import Exit
from de3.exits.reading import read
from de3.exits.signals import Signal, edr
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.runtime.answer import rounded
from de3.runtime.choice import Choice
from de3.runtime.errors import Cause, RequestError
from de3.runtime.options import ExitOptions
from de3.runtime.rules import Rules
from de3.server import infer
from de3.server.http import classify
from de3.server.http.errors import STATUSES
from de3.server.settings import Settings
from tests.fixtures import make_rows
from tests.serving import Server, serving, until

TEXTS = [text for text, _ in make_rows(60, 11)]
PROBS = st.floats(0, 1) | st.integers(0, 10**6 - 1).map(lambda k: (k + 0.5) / 10**6)  # between two results


@given(st.lists(PROBS, max_size=40))
def test_probabilities_are_rounded_as_python_rounds(probs: list[float]) -> None:
    assert rounded(probs) == [round(prob, 6) for prob in probs]


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny", "tiny-int8"], threads=2, max_texts=150) as running:
        yield running


@pytest.fixture(scope="module")
def model(store: Path) -> Model:
    return Model(Store(store).open("tiny"))


@pytest.fixture(scope="module")
def steps(model: Model) -> list[list[Any]]:
    """For each text, the outputs of every exit of the plain model."""
    return [model.full_depth(model.tokenize(text)) for text in TEXTS]


def expected(model: Model, steps: list[Any], tau: float, signal: Signal) -> dict[str, Any]:
    """The expected answer: the plain model at full depth, and the paper's formulas at each exit."""
    for layer, step in enumerate(steps):
        assert step.logits is not None
        distances = None if step.distances is None else step.distances.tolist()
        reading = read(layer, step.logits.tolist(), distances)  # test_rule.py compares it with the paper
        if signal.state_weights is not None:
            reading.state_term = float(step.hidden[0].mean(0) @ signal.state_weights[layer])
        score = signal.score([reading])
        last = layer == model.manifest.num_layers
        if last or (score is not None and score < tau):
            label = model.manifest.labels[int(np.argmax(step.logits))]
            left = {"layer": layer, "num_layers": model.manifest.num_layers, "tau": tau}
            left |= {
                "reason": "last_layer" if last else "threshold",
                "signal": signal.name,
                "lambda": signal.lam,
            }
            signals = {"score": score, "entropy": reading.entropy, "distance_ratio": reading.distance_ratio}
            signals |= {"edr": edr(reading, signal.lam or 1.0)}
            left |= {name: None if x is None else float(f"{x:.6g}") for name, x in signals.items()}
            return {"label": label, "probs": [round(p, 6) for p in reading.probs], "exit": left}
    raise AssertionError


@pytest.mark.parametrize(
    ("asked", "name", "lam"),
    [
        ({"signal": "entropy"}, "entropy", None),
        ({"lambda": 0}, "entropy", None),
        ({"signal": "edr", "lambda": 0}, "entropy", None),
        ({"lambda": 8}, "edr", 8.0),
        ({"signal": "risk"}, "risk", None),
    ],
)
def test_answers_are_those_of_the_full_model(
    server: Server, model: Model, steps: list[Any], asked: dict[str, Any], name: str, lam: float | None
) -> None:
    signal, layers = model.manifest.signal(name, lam), dict[float, set[int]]()
    for tau in (0.0, 0.05, 0.3, 1.0):
        answer = server.classify(**{"input": TEXTS, "tau": tau, **asked}).json()
        assert answer["object"] == "list" and answer["model"] == "tiny:1"
        for i, (passed, row) in enumerate(zip(steps, answer["data"], strict=True)):
            assert row == {"index": i, "num_classes": 2, **expected(model, passed, tau, signal)}
        layers[tau] = {row["exit"]["layer"] for row in answer["data"]}
    assert layers[0.0] == {3} and max(layers[1.0]) < 3
    assert answer["usage"]["prompt_tokens"] == sum(len(model.tokenize(t)) for t in TEXTS)


def test_many_at_once_get_the_same_bits_as_one_at_a_time(server: Server) -> None:
    def ask(text: str, name: str) -> str:
        return json.dumps(server.classify(input=text, model=name, explain=True).json()["data"])

    for name in ("tiny", "tiny-int8"):
        alone = [ask(text, name) for text in TEXTS[:24]]
        with ThreadPoolExecutor(24) as pool:
            together = list(pool.map(lambda text, name=name: ask(text, name), TEXTS[:24]))
        assert together == alone
        in_one_list = server.classify(input=TEXTS[:24], model=name, explain=True).json()["data"]
        assert [json.dumps([{**row, "index": 0}]) for row in in_one_list] == alone


def test_a_response_has_a_limited_number_of_probabilities(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer, "MAX_PROBS", 9)  # of two labels
    cases = [(4, False, 200), (5, False, 422), (1, True, 200), (2, True, 422)]
    for texts, explain, status in cases:
        answer = server.classify(input=TEXTS[:texts], explain=explain)
        assert answer.status_code == status, answer.text
    said = "input: 2 texts; at most 1 are allowed with 8 probabilities for each text"
    assert answer.json()["error"] | {"message": said, "param": "input"} == answer.json()["error"]


def test_which_option_sets_the_rule(model: Model) -> None:
    manifest, defaults = model.manifest, model.manifest.defaults
    assert manifest.calibration is not None

    def choose(options: dict[str, Any], **settings: Any) -> Choice:
        return Rules(manifest, Settings(**settings)).choose(ExitOptions(**options))

    certified, fast = choose({}, max_disagreement=0.5), choose({"target_speedup": 1.5})
    for choice, set_by, requested, tau, max_layer, budget_s in (
        (choose({}), "default", None, defaults.tau, None, None),
        (choose({"max_layer": 1}), "default", None, defaults.tau, 1, None),
        (choose({"tau": 0.0, "max_layer": 2}), "tau", 0.0, 0.0, 2, None),
        (choose({}, tau=0.25), "default", None, 0.25, None, None),
        (choose({}, latency_budget_ms=20), "latency_budget_ms", 20, defaults.tau, None, 0.02),
        # A request's own option replaces the server's.
        (choose({"tau": 0.25}, latency_budget_ms=20), "tau", 0.25, 0.25, None, None),
    ):
        found = choice.rule.tau, choice.rule.max_layer, choice.budget_s
        assert (choice.set_by, choice.requested, *found) == (set_by, requested, tau, max_layer, budget_s)
        assert (choice.expected is None) == (max_layer is not None)  # the calibration has no such limit
    assert choose({"signal": "entropy"}, latency_budget_ms=20).budget_s is None
    assert fast.expected is not None and fast.expected.speedup >= 1.5 and fast.rule.tau == fast.expected.tau
    guarantee = certified.certificate
    assert guarantee is not None and guarantee["bound"] <= guarantee["max_disagreement"] == 0.5
    assert guarantee["samples"] == manifest.calibration.certify_size
    hurried = choose(
        {"latency_budget_ms": 50}, max_disagreement=0.5
    )  # may exit earlier, so nothing is certified
    assert hurried.certificate is None and hurried.rule == certified.rule

    later = Rules(manifest.model_copy(update={"exit_layers": [1, 2, 3]}), Settings())
    assert [later.choose(ExitOptions(max_layer=n)).rule.max_layer for n in (1, 3)] == [1, 3]
    for layer in (0, 4):
        with pytest.raises(RequestError, match="max_layer: must be from 1 to 3"):
            later.choose(ExitOptions(max_layer=layer))


# test_contract.py has the errors that are those of every protocol.
BAD: list[tuple[bytes, int, str | None, str]] = [
    (b'{"input": "\\ud800"}', 400, None, "not JSON"),
    (b'{"input": {"text": "a"}}', 422, "input", "text_pair"),
    (b'{"input": {"text": "a", "text_pair": "b", "x": 1}}', 422, "input", "'x'"),
    (b'{"input": "a", "tau": NaN}', 422, "tau", "finite"),
    (b'{"input": "a", "lambda": 100.5}', 422, "lambda", "allowed: 0 to 100"),
    (b'{"input": "a", "' + b"x" * 5000 + b'": 1}', 422, "x" * 100, "unknown field"),
    (b'{"input": "a", "max_layer": 1.5}', 422, "max_layer", "integer"),
    (b'{"input": "a", "model": "other"}', 404, "model", "available: tiny:1, tiny-int8:1"),
    (b'{"input": "a", "target_speedup": 1001}', 422, "target_speedup", "at most"),
    (b'{"input": "a", "latency_budget_ms": 60001}', 422, "latency_budget_ms", "at most 60000"),
    (b'{"input": "a", "max_layer": 1, "latency_budget_ms": 9}', 422, "max_layer", "is only valid with tau"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), BAD, ids=[str(b[0][:40]) for b in BAD])
def test_bad_input_is_explained_and_survived(
    server: Server, body: bytes, status: int, param: str | None, message: str
) -> None:
    response = httpx.post(server.url + "/classify", content=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)
    assert message in error["message"]
    assert server.classify(input="fine").status_code == 200


def test_what_was_asked_before_is_told_from_what_python_finds_equal(server: Server) -> None:
    """The options of earlier requests are kept, those of a limited number."""
    asked: list[tuple[str, Any]] = [('"tau": 0', 0.0), ('"tau": false', None), ('"explain": 1.0', None)]
    asked += [
        ('"explain": 1', None),
        ('"tau": 1', 1.0),
        ('"tau": true', None),
        ('"tau": 1, "signal": 1', None),
    ]
    asked += [(f'"tau": 0.{number:03}', number / 1000) for number in range(classify.MAX_FORMS + 2)]
    asked += [(f'"request_id": "{"a" * classify.MAX_FORM}"', None)]
    for options, tau in [*asked, *asked[:8], *reversed(asked)]:
        answer = httpx.post(server.url + "/classify", content=f'{{"input": "a", "model": "tiny", {options}}}')
        assert answer.status_code == (422 if tau is None else 200), options
        assert tau is None or answer.json()["data"][0]["exit"]["tau"] == tau
    assert len(classify._FORMS) <= classify.MAX_FORMS


def test_health_ready_and_docs(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
    wrong = httpx.get(server.url + "/predict")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error_type"]) == (
        405,
        "POST",
        "validation",
    )
    page = httpx.get(server.url + "/docs").text
    assert "swagger-ui" in page and "https://" not in page.replace("https://fastapi", "")
    schema = httpx.get(server.url + "/openapi.json").json()
    known = {field.name for field in fields(Exit)}
    assert known - {"lam"} | {"lambda"} == schema["components"]["schemas"]["Exit"]["properties"].keys()
    operation = schema["paths"]["/classify"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    for name, example in body["examples"].items():
        accepted = httpx.post(server.url + "/classify", json=example["value"])
        assert accepted.status_code == 200, (name, accepted.text)
    assert {"200", "400", "404", "413", "422", "503", "504"} <= set(operation["responses"])


def test_a_slow_body_is_not_queue_time(server: Server) -> None:
    took_s = 0.0

    def slow() -> Iterator[bytes]:
        nonlocal took_s
        yield b'{"input": '
        until(lambda: server.bodies_awaited() == 1, "the head to arrive")
        began = time.perf_counter()
        server.classify(input=TEXTS, tau=0)  # in the meantime
        took_s = time.perf_counter() - began
        yield b'"good"}'

    response = httpx.post(server.url + "/classify", content=slow())
    times = [x.split(";dur=") for x in response.headers["server-timing"].split(", ")]
    stages = {name: float(took) for name, took in times}
    assert list(stages) == ["read", "queue", "tokenize", "model", "total"]
    assert stages["read"] > 1000 * took_s and stages["queue"] <= stages["total"] - stages["read"] + 0.1


def test_metrics_count_what_happened(server: Server) -> None:
    def read() -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for line in httpx.get(server.url + "/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                found[re.sub(r'(,?)reason="\w+"', "", name)] += float(value)
        return found

    before = read()
    rows = server.classify(input=TEXTS[:20], tau=0.3).json()["data"]
    server.classify(input="")
    until(lambda: server.service.in_flight == 0, "the requests to end")  # answers may come earlier
    after = read()
    exits = [row["exit"] for row in rows]
    layers = [one["layer"] for one in exits]
    expected = {
        'de3_exit_layer_count{model="tiny:1"}': 20,
        'de3_exit_layer_sum{model="tiny:1"}': sum(layers),
        'de3_exit_layer_bucket{le="1.0",model="tiny:1"}': sum(x <= 1 for x in layers),
        'de3_layers_run_total{model="tiny:1"}': sum(layers),
        'de3_layers_saved_total{model="tiny:1"}': sum(3 - x for x in layers),
        'de3_exit_entropy_bucket{le="0.1",model="tiny:1"}': sum(one["entropy"] <= 0.1 for one in exits),
        'de3_request_latency_seconds_count{model="tiny:1"}': 1,
        'de3_stage_latency_seconds_count{model="tiny:1",stage="queue"}': 20,
        'de3_requests_total{model="none",status="422"}': 1,
        'de3_rejected_total{cause="bad_request"}': 1,
    }
    grew = {name: value - before[name] for name, value in after.items()}
    assert {name: grew[name] for name in expected} == expected
    spent = grew['de3_stage_latency_seconds_sum{model="tiny:1",stage="model"}']
    assert min(layers) < 3 and grew['de3_full_depth_seconds_total{model="tiny:1"}'] > spent
    assert after["de3_in_flight_requests"] == 0 and after["de3_queue_texts"] == 0 and after["de3_ready"] == 1


def test_at_full_depth_no_time_is_saved(server: Server) -> None:
    def seconds() -> Any:
        spent = server.metric("de3_stage_latency_seconds_sum", model="tiny:1", stage="model")
        return np.array([spent, server.metric("de3_full_depth_seconds_total", model="tiny:1")])

    before = seconds()
    server.classify(input=TEXTS[:20], tau=0)
    spent, full = seconds() - before
    assert full == pytest.approx(spent)


def test_expected_accuracy_is_that_of_the_calibration(server: Server) -> None:
    served = server.service.models.get("tiny")
    assert served.rules.trade_offs is not None
    full = served.rules.trade_offs.rows[0]

    def counts() -> list[float]:
        kinds = ("calibrated", "expected_correct")
        return [server.metric(f"de3_{kind}_texts_total", model="tiny:1") for kind in kinds]

    known, right = counts()
    server.classify(input=["good", "bad"], tau=0)
    server.classify(input="good", tau=0.123456)  # the calibration has no such τ
    assert counts() == pytest.approx([known + 2, right + 2 * full.accuracy])
    assert server.metric("de3_full_depth_accuracy", model="tiny:1") == full.accuracy
    assert server.metric("de3_tau", model="tiny:1") == served.rules.default.rule.tau


def test_every_cause_has_a_series_before_it_happens(server: Server) -> None:
    samples = (s for family in server.service.metrics.registry.collect() for s in family.samples)
    causes = {s.labels["cause"] for s in samples if s.name == "de3_rejected_total"}
    assert causes == set(get_args(Cause)) == set(STATUSES) >= {"shed", "client_gone"}
