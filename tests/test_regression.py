"""Regression models (one output): imported, calibrated, served; values within the tolerance count as equal."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from de3.client import Client
from de3.data.examples import Example, load_examples, save_examples
from de3.exits import formulas
from de3.exits.kinds import Value
from de3.exits.reading import sigmoid
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule
from de3.exits.signals import Risk
from de3.loadtest.client import label_of
from de3.model_store.manifest import MIN_TOLERANCE
from de3.model_store.store import Store, StoreError
from de3.training.measures import correlation
from tests.commands import de3, refusal
from tests.fixtures import BAD, GOOD, make_rows, save_encoder
from tests.serving import Server, serving, until
from tests.stock import fine_tuned, imported_as, transformers_model
from tests.test_models import KEY, change

TOLERANCE = 0.5


def value_of(text: str) -> float:
    """Number of words of praise minus words of blame; "not" reverses the next word."""
    words = text.split()
    signs = [(word in GOOD) - (word in BAD) for word in words]
    negated = [before == "not" for before in ["", *words[:-1]]]
    return float(sum(-s if n else s for s, n in zip(signs, negated, strict=True)))


@pytest.fixture(scope="session")
def stock(encoder: Path) -> Path:
    """The folder of a stock regression model."""
    examples = [Example(text, value_of(text)) for text, _ in make_rows(800, 1)]
    return fine_tuned("regression", encoder, ["praise"], examples, epochs=3)


@pytest.fixture(scope="session")
def imported(stock: Path) -> Path:
    return imported_as("praise", stock, f"--tolerance {TOLERANCE}")


@pytest.fixture(scope="module")
def server(imported: Path) -> Iterator[Server]:
    with serving(imported / "store", models=["praise"]) as running:
        yield running


def test_an_artifact_records_its_tolerance(imported: Path) -> None:
    artifact = Store(imported / "store").open("praise")
    manifest = artifact.manifest
    assert (manifest.labels, manifest.tolerance, manifest.prototype_layers) == (["praise"], TOLERANCE, [])
    assert manifest.calibration is not None and manifest.calibration.default.speedup > 1.1
    assert {row.signal for row in manifest.calibration.table} == {"risk"} == {manifest.defaults.signal}
    assert all(r.entropy is None for r in manifest.calibration.references)


def test_full_depth_gives_the_values_of_transformers(server: Server, stock: Path) -> None:
    model, tokenizer = transformers_model(stock)
    texts = ["good and bad", "a superb fine film", "the plot", "a", "not great , awful"]
    rows = server.described(input=texts, tau=0, explain=True)["data"]
    for text, row in zip(texts, rows, strict=True):
        with torch.no_grad():
            value = float(model(**tokenizer(text, return_tensors="pt")).logits)
        assert row["value"] == pytest.approx(value, abs=0.2)  # int8 changes it a little
        assert (row["label"], row["probs"], row["num_classes"]) == ("praise", None, 1)
        assert row["exit"]["entropy"] is row["exit"]["distance_ratio"] is row["exit"]["edr"] is None
        assert [r["layer"] for r in row["layers"]] == [0, 1, 2, 3]
        assert row["layers"][-1]["value"] == row["value"]
    raw = server.classify(input=texts, tau=0, raw=True).json()["data"]
    assert [row["value"] for row in raw] == [row["value"] for row in rows]
    listed = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert (listed["tolerance"], listed["labels"], listed["signals"]) == (TOLERANCE, ["praise"], ["risk"])


def test_a_value_has_a_certificate_and_exits_where_its_layers_say(server: Server) -> None:
    body = {"input": [text for text, _ in make_rows(60, 77)], "max_disagreement": 0.5}
    answer, explained = (server.classify(**body, explain=explain).json() for explain in (False, True))
    assert answer["certificate"]["bound"] <= 0.5
    for row, other in zip(answer["data"], explained["data"], strict=True):
        assert (row["value"], row["exit"]) == (other["value"], other["exit"])
        *before, last = other["layers"]
        assert all(r["score"] >= row["exit"]["tau"] for r in before) and last["layer"] == row["exit"]["layer"]
    assert server.metric("de3_exit_entropy_count") == 0 < server.metric("de3_exit_layer_count")


def test_options_that_need_classes_are_refused(server: Server) -> None:
    for field, value, message in (
        ("top_k", 1, "it has no labels to rank"),
        ("thresholds", 0.3, "its answer is a number"),
        ("signal", "entropy", "entropy needs classes"),
        ("lambda", 1, "edr needs classes"),
    ):
        answer = server.classify(input="a", **{field: value})
        assert answer.status_code == 422, answer.text
        error = answer.json()["error"]
        assert message in error["message"] and error["param"] == field


def test_other_protocols_answer_as_their_peers(server: Server) -> None:
    text = "a superb fine film"
    value = server.classify(input=text).json()["data"][0]["value"]
    probability = round(sigmoid(value), 6)
    for function, score in ((None, value), ("none", value), ("sigmoid", probability), ("softmax", 1.0)):
        found = server.classify(inputs=text, parameters={"function_to_apply": function}).json()
        assert found == [{"label": "praise", "score": score}]
    for raw, score in ((True, value), (False, probability)):  # as in Text Embeddings Inference
        tei = httpx.post(f"{server.url}/predict", json={"inputs": text, "raw_scores": raw}).json()
        assert tei == [{"label": "praise", "score": score}]
    assert server.classify(text=text).json()["embedding"] == [value]  # SGLang's format
    body: dict[str, Any] = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]}
    url = f"{server.url}/v2/models/praise"
    outputs = httpx.post(f"{url}/infer", json=body).json()["outputs"]
    assert {o["name"]: o["data"] for o in outputs}["value"] == [value]
    assert [o["name"] for o in httpx.get(url).json()["outputs"]] == [o["name"] for o in outputs]
    refused = httpx.post(f"{url}/infer", json=body | {"outputs": [{"name": "probs"}]})
    assert refused.status_code == 422 and "available: label, value, exit_layer" in refused.json()["error"]
    predicted = httpx.post(f"{server.url}/v1/models/praise:predict", json={"instances": [text]}).json()
    assert predicted == {"predictions": [value]}
    with Client(server.url) as client:
        row = client.classify(text).rows[0]
    assert (row.value, row.probs, row.exit.entropy) == (value, [], None)
    assert label_of({"data": [row.raw]}) == str(value)
    assert de3(f"classify {text.split()[1]} --url {server.url}").startswith("praise  ")


def test_a_shadow_differs_by_more_than_the_tolerance(imported: Path, tmp_path: Path) -> None:
    """The shadow is the same model with another default τ, so its answers are known in advance."""
    for version, tau in ((1, 0.0), (2, 0.9)):
        path = Path(shutil.copytree(imported / "store/praise/1", tmp_path / f"praise/{version}"))
        manifest = json.loads((path / "manifest.json").read_text())
        new = {"version": version, "defaults": manifest["defaults"] | {"tau": tau}}
        (path / "manifest.json").write_text(json.dumps(manifest | new))
    body = {"input": [text for text, _ in make_rows(40, 8)]}
    with serving(tmp_path, models=["praise:1"], admin_keys=f"root {KEY}") as server:
        early = [row["value"] for row in server.classify(**body, tau=0.9).json()["data"]]
        assert change(server, "load", "praise", version=2, role="shadow").status_code == 200
        full = [row["value"] for row in server.classify(**body).json()["data"]]
        gaps = np.abs(np.subtract(full, early))
        assert 0 < (gaps > TOLERANCE).sum() < (gaps > 0).sum()
        until(lambda: server.metric("de3_shadow_texts_total") == 40, "the shadow")
        assert server.metric("de3_shadow_disagreements_total") == (gaps > TOLERANCE).sum()


@given(
    st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=3, max_size=3),
    st.tuples(*[st.tuples(*[st.floats(-1e6, 1e6) | st.floats(-5, 5)] * 3, st.just(0.0), st.just(0.0))] * 3),
)
def test_the_decision_on_a_value_is_the_exit_rules(kernels: Any, values: list[float], weights: Any) -> None:
    signal = Risk(weights)
    rule = ExitRule(0.5, signal, kind=Value(0.5))
    readings = [rule.kind.read(layer, [x], None) for layer, x in enumerate(values)]
    assert [r.answer for r in readings] == values and readings[0].entropy is None
    buffers = [(np.float32([x]), None) for x in values]
    for count in (1, 2, 3):
        expected = signal.score(readings[:count])
        found = kernels.score(buffers[:count], signal.code, 0.0, np.array(weights[:count]).tobytes(), None)
        assert found == expected or (math.isnan(found) and math.isnan(expected or 0.0))
    logits, distances = np.float32([values])[..., None], np.full((1, 3, 1), np.nan, np.float32)
    recorded = Recorded([0, 1, 2], logits, distances, np.zeros(1), kind=Value(0.5))
    assert (recorded.risk_features[0] == formulas.value_features(values)).all()
    scores = signal.scores(recorded)[0]
    assert scores == pytest.approx([signal.score([reading]) for reading in readings], abs=1e-6)
    for code in (0, 1):  # neither entropy nor EDR is defined
        assert math.isnan(kernels.score(buffers, code, 1.0, None, None))


def test_the_import_asks_for_a_tolerance(stock: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text}\n" for text, _ in make_rows(600, 12)))
    options = f"--texts {texts} --name x --store {tmp_path}/s --work {tmp_path}/w"
    message = refusal(f"import {stock} {options}")
    assert "--tolerance: needed, because the answer is a number" in message
    assert 0.05 < float(message.rpartition(" ")[2]) < 1  # the suggestion
    assert not (tmp_path / "s").exists()
    for value in ("nan", "1e10", str(MIN_TOLERANCE / 2)):
        assert "--tolerance must be from 0.001 to 1e+09" in refusal(
            f"import {stock} {options} --tolerance {value}"
        )
    classifier = save_encoder(tmp_path / "m", labels=2)
    assert "--tolerance: " in (message := refusal(f"import {classifier} {options} --tolerance 0.5"))
    assert "has 2 labels" in message


@pytest.mark.usefixtures("few_taus")
def test_a_recalibration_keeps_the_tolerance_and_counts_against_full_depth(
    imported: Path, tmp_path: Path
) -> None:
    shutil.copytree(imported / "store", tmp_path / "store")
    for part, seed in (("tune", 21), ("certify", 22)):
        examples = [Example(text, value_of(text)) for text, _ in make_rows(400, seed)]
        save_examples(tmp_path / f"{part}.jsonl", examples, ["praise"])
    parts = f"--tune {tmp_path}/tune.jsonl --certify {tmp_path}/certify.jsonl"
    output = de3(f"calibrate praise --store {tmp_path}/store {parts} --max-loss 5")
    assert "counts disagreement against full depth" in " ".join(output.split())
    old, new = (Store(tmp_path / "store").open(f"praise:{version}").manifest for version in (1, 2))
    assert new.tolerance == TOLERANCE and old.calibration.original_disagreement is not None
    assert new.calibration.original_disagreement is None and not new.calibration.self_labelled


def test_values_as_labels_and_back(tmp_path: Path) -> None:
    examples = [Example("a", 1.5), Example(("b", "c"), 0.0)]
    path = tmp_path / "x.jsonl"
    for part in ([examples[0]], [examples[1]]):
        save_examples(path, part, ["praise"])
        assert load_examples(path, ["praise"], regression=True) == part
    for label in ("true", '"much"', "null", "1e999", '"nan"'):
        path.write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(ValueError, match="label"):
            load_examples(path, ["praise"], regression=True)


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, spearmanr

    values, labels = np.array(pairs, np.float64).T
    if np.ptp(values) == 0 or np.ptp(labels) == 0:
        assert all(math.isnan(x) for x in correlation(values, labels))
    else:
        expected = pearsonr(values, labels).statistic, spearmanr(values, labels).statistic
        assert correlation(values, labels) == pytest.approx(expected, abs=1e-9)


def test_an_unsound_manifest_is_refused(imported: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(imported / "store", tmp_path / "store")) / "praise/1/manifest.json"
    sound = json.loads(path.read_text())
    for fields, message in (
        ({"labels": ["a", "b"]}, "exactly one if there is a tolerance"),
        ({"thresholds": [0.5]}, "thresholds and tolerance must not both be set"),
        ({"risk": [{"layer": m, "weights": [0, 0, 0, m / 2, 0]} for m in range(3)]}, "weights must be 0"),
        ({"prototype_layers": [0, 1, 2]}, "prototype_layers must be empty in a regression model"),
        (
            {"defaults": {"tau": 0.1, "signal": "entropy", "lambda": None}},
            "entropy needs classes, and praise",
        ),
    ):
        path.write_text(json.dumps(sound | fields))
        with pytest.raises(StoreError, match=message):
            Store(tmp_path / "store").open("praise")


def test_a_recorded_value_that_is_not_a_number_is_wrong() -> None:
    values = np.array([[[np.nan], [1.0]]], np.float32)
    recorded = Recorded([1, 2], values, np.full_like(values, np.nan), np.array([1.0]), kind=Value(0.5))
    assert recorded.correct.tolist() == [[False, True]] and recorded.differs.tolist() == [[True, False]]
