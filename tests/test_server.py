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
from de3.server import infer
from de3.server.answer import rounded
from de3.server.errors import Cause, RequestError
from de3.server.http.errors import STATUSES
from de3.server.options import ExitOptions
from de3.server.rules import Rules
from de3.server.settings import Settings
from tests.fixtures import make_rows
from tests.serving import Server, serving, until

TEXTS = [text for text, _ in make_rows(120, 11)]


PROBS = st.floats(0, 1) | st.integers(0, 10**6 - 1).map(
    lambda k: (k + 0.5) / 10**6
)  # some between two results


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


@pytest.mark.parametrize("tau", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    ("asked", "name", "lam"),
    [
        ({"signal": "entropy"}, "entropy", None),
        ({"lambda": 0}, "entropy", None),
        ({"signal": "entropy", "lambda": 0}, "entropy", None),
        ({"signal": "edr", "lambda": 0}, "entropy", None),
        ({"signal": "edr", "lambda": 1}, "edr", 1.0),
        ({"lambda": 8}, "edr", 8.0),
        ({"signal": "risk"}, "risk", None),
    ],
)
def test_answers_are_those_of_the_full_model(
    server: Server,
    model: Model,
    steps: list[list[Any]],
    tau: float,
    asked: dict[str, Any],
    name: str,
    lam: float | None,
) -> None:
    signal = model.manifest.signal(name, lam)
    answer = server.classify(**{"input": TEXTS, "tau": tau, **asked}).json()
    assert answer["object"] == "list" and answer["model"] == "tiny:1"
    layers = set()
    for i, (passed, row) in enumerate(zip(steps, answer["data"], strict=True)):
        want = expected(model, passed, tau, signal)
        layers.add(want["exit"]["layer"])
        assert row == {"index": i, "num_classes": 2, **want}
    assert layers == {3} if tau == 0 else max(layers) < 3 or tau < 1
    assert answer["usage"]["prompt_tokens"] == sum(len(model.tokenize(t)) for t in TEXTS)


def test_64_at_once_get_the_same_bits_as_one_at_a_time(server: Server) -> None:
    def ask(text: str, name: str) -> str:
        row = server.classify(input=text, model=name, explain=True).json()["data"]
        return json.dumps(row)

    for name in ("tiny", "tiny-int8"):
        alone = [ask(text, name) for text in TEXTS[:48]]
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(lambda text, name=name: ask(text, name), TEXTS[:48] * 2))
        assert together == alone * 2
        in_one_list = server.classify(input=TEXTS[:48], model=name, explain=True).json()["data"]
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


def test_a_pair_is_not_its_texts_joined(server: Server, model: Model) -> None:
    pair = {"text": "good film", "text_pair": "a dull plot"}
    row = server.classify(input=pair, tau=0).json()["data"][0]
    step = model.full_depth(model.tokenize("good film", "a dull plot"))[-1]
    assert step.logits is not None
    assert row["probs"] == pytest.approx(read(3, step.logits.tolist(), None).probs, abs=5.1e-7)
    assert row["probs"] != server.classify(input="good film a dull plot", tau=0).json()["data"][0]["probs"]
    many = server.classify(input=[pair, pair], tau=0).json()["data"]
    assert [r["probs"] for r in many] == [row["probs"]] * 2


def test_max_layer_ends_a_text(server: Server) -> None:
    for max_layer in range(4):
        row = server.classify(input="it is the film", tau=0, max_layer=max_layer).json()["data"][0]
        assert row["exit"]["layer"] == max_layer
        assert row["exit"]["reason"] == ("last_layer" if max_layer == 3 else "max_layer")


def test_which_option_sets_the_rule(model: Model) -> None:
    manifest = model.manifest
    assert manifest.calibration is not None
    rules, defaults = Rules(manifest, Settings()), manifest.defaults
    plain = rules.choose(ExitOptions())
    assert (plain.set_by, plain.requested, plain.rule.tau, plain.budget_s) == (
        "default",
        None,
        defaults.tau,
        None,
    )
    assert plain.expected is not None and plain.expected.tau == defaults.tau
    limited = rules.choose(ExitOptions(max_layer=1))
    assert (limited.set_by, limited.rule.tau, limited.rule.max_layer) == ("default", defaults.tau, 1)
    assert limited.expected is None  # the calibration has no such limit
    exact = rules.choose(ExitOptions(tau=0.0, max_layer=2))
    assert (exact.set_by, exact.requested, exact.rule.tau, exact.rule.max_layer) == ("tau", 0.0, 0.0, 2)
    assert exact.expected is None and rules.choose(ExitOptions(tau=0.0)).expected is not None
    fast = rules.choose(ExitOptions(target_speedup=1.5))
    assert (fast.set_by, fast.requested) == ("target_speedup", 1.5)
    assert fast.expected is not None and fast.expected.speedup >= 1.5 and fast.rule.tau == fast.expected.tau

    certified = Rules(manifest, Settings(max_disagreement=0.5))
    guarantee = certified.choose(ExitOptions()).certificate
    assert guarantee is not None and guarantee["bound"] <= guarantee["max_disagreement"] == 0.5
    assert guarantee["samples"] == manifest.calibration.certify_size
    hurried = certified.choose(ExitOptions(latency_budget_ms=50))  # may exit earlier, so nothing is certified
    assert (hurried.set_by, hurried.requested, hurried.budget_s) == ("latency_budget_ms", 50, 0.05)
    assert hurried.certificate is None and hurried.rule == certified.default.rule
    timed = Rules(manifest, Settings(latency_budget_ms=20))
    assert (timed.default.rule.tau, timed.default.budget_s) == (defaults.tau, 0.02)
    assert Rules(manifest, Settings(tau=0.25)).default.rule.tau == 0.25
    assert timed.choose(ExitOptions(tau=0.5)).budget_s is None  # a request's own option replaces the server's
    assert timed.choose(ExitOptions(signal="entropy")).budget_s is None

    later = Rules(manifest.model_copy(update={"exit_layers": [1, 2, 3]}), Settings())
    assert [later.choose(ExitOptions(max_layer=n)).rule.max_layer for n in (1, 3)] == [1, 3]
    for layer in (0, 4):
        with pytest.raises(RequestError, match="max_layer: must be from 1 to 3"):
            later.choose(ExitOptions(max_layer=layer))


def test_truncation_is_that_of_transformers(server: Server, model: Model, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoint)
    a, b = "good film and a dull plot " * 9, "the scene is not bad " * 8
    for pair in ((a, None), (a * 4, None), (a, b), (a, b[:30]), (b[:30], a), (a * 3, b * 3)):
        want = reference(*pair, truncation=True, max_length=64, padding=False)
        got = model.tokenize(*pair)
        assert got.ids[0].tolist() == want["input_ids"], pair
        assert got.type_ids[0].tolist() == want["token_type_ids"], pair


def test_models_by_name_and_version(server: Server) -> None:
    for name in ("tiny-int8", "tiny-int8:1"):
        assert server.classify(input="fine", model=name).json()["model"] == "tiny-int8:1"
    listed = httpx.get(server.url + "/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["tiny:1", "tiny-int8:1"]
    assert listed[0]["labels"] == ["negative", "positive"]
    assert listed[0]["calibration"]["speedup"] > 1


def test_a_request_without_a_model_among_several(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.models, "default", None)
    for path, field in (("/classify", "input"), ("/predict", "inputs"), ("/", "inputs")):
        response = httpx.post(server.url + path, json={field: "good"})
        assert response.status_code == 422, path
        assert "model: is required, as several are served: tiny, tiny-int8" in response.text
    assert server.classify(input="good", model="tiny").status_code == 200
    rows = httpx.get(server.url + "/v1/models").json()["data"]
    assert [row["is_default"] for row in rows] == [False, False]


BAD: list[tuple[bytes, int, str | None, str]] = [
    (b'{"input": "\xff\xfe"}', 400, None, "not JSON"),
    (b'{"input": "\\ud800"}', 400, None, "not JSON"),
    (b'{"input": null}', 422, "input", "got null"),
    (b'{"input": ""}', 422, "input", "must not be empty"),
    (b'{"input": ["a", ["b"]]}', 422, "input", "input[1]: must be a text"),
    (b'{"input": {"text": "a"}}', 422, "input", "text_pair"),
    (b'{"input": {"text": "a", "text_pair": "b", "x": 1}}', 422, "input", "'x'"),
    (b'{"input": [{"text": "a", "text_pair": 1}]}', 422, "input", "input[0].text_pair: must be"),
    (b'{"input": "a", "tau": -0.01}', 422, "tau", "allowed: 0 to 1"),
    (b'{"input": "a", "tau": 1.01}', 422, "tau", "allowed: 0 to 1"),
    (b'{"input": "a", "tau": NaN}', 422, "tau", "finite"),
    (b'{"input": "a", "tau": "0.5"}', 422, "tau", "number"),
    (b'{"input": "a", "lambda": -1}', 422, "lambda", "allowed: 0 to 100"),
    (b'{"input": "a", "lambda": 100.5}', 422, "lambda", "allowed: 0 to 100"),
    (b'{"input": "a", "lam": 1}', 422, "lam", "unknown field"),
    (b'{"input": "a", "' + b"x" * 5000 + b'": 1}', 422, "x" * 100, "unknown field"),
    (b'{"input": "a", "max_layer": 4}', 422, "max_layer", "from 0 to 3"),
    (b'{"input": "a", "max_layer": 1.5}', 422, "max_layer", "integer"),
    (b'{"input": "a", "truncate": "yes"}', 422, "truncate", "boolean"),
    (b'{"input": "a", "model": "other"}', 404, "model", "available: tiny:1, tiny-int8:1"),
    (b'{"input": "a", "target_speedup": 0.5}', 422, "target_speedup", "allowed: 1 or more"),
    (b'{"input": "a", "target_speedup": 1001}', 422, "target_speedup", "at most"),
    (b'{"input": "a", "latency_budget_ms": 0}', 422, "latency_budget_ms", "more than 0, at most 60000"),
    (b'{"input": "a", "latency_budget_ms": 60001}', 422, "latency_budget_ms", "at most 60000"),
    (b'{"input": "a", "max_disagreement": 1.5}', 422, "max_disagreement", "allowed: 0 to 1"),
    (b'{"input": "a", "tau": 0, "target_speedup": 2}', 422, "target_speedup", "cannot be combined with tau"),
    (b'{"input": "a", "max_layer": 1, "latency_budget_ms": 9}', 422, "max_layer", "is only valid with tau"),
    (b'{"input": ' + json.dumps(["a"] * 151).encode() + b"}", 422, "input", "151 texts; at most 150"),
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


def test_other_paths_and_methods(server: Server) -> None:
    missing = httpx.get(server.url + "/nowhere")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")
    wrong = httpx.get(server.url + "/classify")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert "not allowed" in wrong.json()["error"]["message"]


def test_texts_of_every_script(server: Server) -> None:
    for text in (
        "好电影 very good",
        "👍🏽" * 30,
        "a\u0000b",
        "\u202eabc",
        "ﬁlm",
        "word" * 2000,
        "\U0010ffff",
    ):
        assert server.classify(input=text).status_code == 200, text


def test_health_ready_and_docs(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/ready").json() == {"status": "ready"}
    page = httpx.get(server.url + "/docs").text
    assert "swagger-ui" in page and "https://" not in page.replace("https://fastapi", "")
    schema = httpx.get(server.url + "/openapi.json").json()
    operation = schema["paths"]["/classify"]["post"]
    body = operation["requestBody"]["content"]["application/json"]
    for name, example in body["examples"].items():
        accepted = httpx.post(server.url + "/classify", json=example["value"])
        assert accepted.status_code == 200, (name, accepted.text)
    assert {"200", "400", "404", "413", "422", "503", "504"} <= set(operation["responses"])


def test_the_schema_describes_answers(store: Path) -> None:
    asked: tuple[dict[str, Any], ...] = (
        {"tau": 0.3},
        {"top_k": 1, "raw": True, "signal": "entropy"},
        {"max_disagreement": 1},
        {"explain": True, "ood": True, "lambda": 2, "tau": 0.3},
        {"explain": True, "long": "windows"},
        {"flag": "negative", "long": "windows"},
    )
    texts = ["good film", "bad plot " * 400, "zebra quantum"]
    seen: dict[str, set[str]] = defaultdict(set)
    with serving(store, models=["tiny"], ood_policy="flag") as server:
        for options in asked:
            answer = server.described(input=texts, **options)
            seen["ClassifyResponse"] |= answer.keys()
            for row in answer["data"]:
                seen["ClassifiedText"] |= row.keys()
                seen["PassedExit"].update(*row.get("layers", []))
        schemas = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
    # Each field occurs, except those of other kinds of models: test_multi_label.py, test_regression.py and
    # test_token_classifiers.py cover them.
    unseen = {name: schemas[name]["properties"].keys() - fields for name, fields in seen.items()}
    assert unseen == {
        "ClassifyResponse": set(),
        "ClassifiedText": {"value", "labels", "spans", "text"},
        "PassedExit": {"value", "spans"},
    }
    known = {field.name for field in fields(Exit)}
    assert known - {"lam"} | {"lambda"} == schemas["Exit"]["properties"].keys()


def test_a_slow_body_is_not_queue_time(server: Server) -> None:
    def slow() -> Iterator[bytes]:
        yield b'{"input": '
        until(lambda: server.bodies_awaited() == 1, "the head to arrive")
        time.sleep(0.3)
        yield b'"good"}'

    response = httpx.post(server.url + "/classify", content=slow())
    times = [x.split(";dur=") for x in response.headers["server-timing"].split(", ")]
    stages = {name: float(took) for name, took in times}
    assert list(stages) == ["read", "queue", "tokenize", "model", "total"]
    assert stages["read"] > 250 and stages["queue"] <= stages["total"] - stages["read"] + 0.1


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
    layers = [row["exit"]["layer"] for row in rows]
    server.classify(input="")
    until(lambda: server.service.in_flight == 0, "the requests to end")  # answers may come earlier
    after = read()

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew('de3_exit_layer_count{model="tiny:1"}') == 20
    assert grew('de3_exit_layer_sum{model="tiny:1"}') == sum(layers)
    assert grew('de3_exit_layer_bucket{le="1.0",model="tiny:1"}') == sum(x <= 1 for x in layers)
    assert grew('de3_layers_run_total{model="tiny:1"}') == sum(layers)
    assert grew('de3_layers_saved_total{model="tiny:1"}') == sum(3 - x for x in layers)
    sure = sum(row["exit"]["entropy"] <= 0.1 for row in rows)
    assert grew('de3_exit_entropy_bucket{le="0.1",model="tiny:1"}') == sure
    ratios = [row["exit"]["distance_ratio"] for row in rows if row["exit"]["distance_ratio"] is not None]
    assert grew('de3_exit_distance_ratio_count{model="tiny:1"}') == len(ratios)
    spent = grew('de3_stage_latency_seconds_sum{model="tiny:1",stage="model"}')
    assert min(layers) < 3 and grew('de3_full_depth_seconds_total{model="tiny:1"}') > spent
    assert grew('de3_request_latency_seconds_count{model="tiny:1"}') == 1
    for stage in ("queue", "tokenize", "model"):
        assert grew(f'de3_stage_latency_seconds_count{{model="tiny:1",stage="{stage}"}}') == 20
    assert grew('de3_requests_total{model="none",status="422"}') == 1
    assert grew('de3_rejected_total{cause="bad_request"}') == 1
    assert after["de3_in_flight_requests"] == 0 and after["de3_queue_texts"] == 0 and after["de3_ready"] == 1


def test_at_full_depth_no_time_is_saved(server: Server) -> None:
    def seconds() -> tuple[float, float]:
        spent = server.metric("de3_stage_latency_seconds_sum", model="tiny:1", stage="model")
        return spent, server.metric("de3_full_depth_seconds_total", model="tiny:1")

    spent, full = seconds()
    server.classify(input=TEXTS[:20], tau=0)
    more_spent, more_full = seconds()
    assert more_full - full == pytest.approx(more_spent - spent)


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
