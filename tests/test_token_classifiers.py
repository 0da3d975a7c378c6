"""Token classifiers: every runtime, group and pass finds the same spans; over HTTP, their fields, limits and errors."""

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from de3.exits.kinds import Spans
from de3.exits.reading import Reading
from de3.exits.rule import ExitRule
from de3.exits.spans import Aggregation, SpanRule, merged
from de3.export.fit import Exits
from de3.export.publish import write_exits
from de3.model_store.families import FAMILIES
from de3.model_store.forward import Decision, ForwardPass, LayerByLayer
from de3.model_store.manifest import Defaults
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.runtime.choice import Choice
from de3.runtime.engine.plan import with_spans
from de3.runtime.engine.queue import WorkQueue
from de3.runtime.engine.request import Request, SpanOptions, Text
from de3.runtime.engine.run import run
from tests import jobs
from tests.fixtures import TAGS, made_once, make_rows
from tests.serving import Server, serving
from tests.stock import token_classifier, with_random_exits

TEXTS = [
    "good",
    *(text for text, _ in make_rows(40, 9)),
    "A film: not bads, qxz 👍🏽 e\u0301\r\nfun [SEP] good!",
]
SECRET = "superb charming tired"  # words of the tokenizer


@pytest.fixture(scope="session")
def tagged() -> Path:
    """A store with a token classifier with random exits, tags:1, and a classifier on its encoder, mood:1."""

    def make(folder: Path) -> None:
        store, rng = Store(folder), np.random.default_rng(5)
        base = with_random_exits(token_classifier("bert"), store, "tags", "int8")

        def random(*shape: int) -> Any:
            return rng.normal(0, 0.3, shape).astype(np.float32)

        linear = [(random(3, 64), random(3)) for _ in range(4)]
        spaces = [(random(64, 64), random(64)) for _ in range(3)]
        exits = Exits("mean", linear, spaces, [random(3, 64) for _ in range(3)], has_last=True)
        fields: dict[str, Any] = {"labels": ["calm", "glad", "sad"], "aggregation": None, "risk": None}
        fields |= {"defaults": Defaults(tau=0, signal="entropy"), "source": None}
        with store.new_version("mood") as draft:
            draft.publish(write_exits(base, exits, draft, name="mood", **fields))

    return made_once("tagged", make)


@pytest.fixture(scope="module")
def model(kernels: Any, tagged: Path) -> Model:
    return Model(Store(tagged).open("tags"), "native")


# Models


# Of the families with one class, one.
@pytest.mark.parametrize("family", {kind: name for name, kind in FAMILIES.items()}.values())
def test_every_exit_gives_the_same_logits_on_every_runtime_and_the_last_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    folder = token_classifier(family)
    store = Store(tmp_path)
    theirs = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    plain = Model(with_random_exits(folder, store, "plain", "fp32"), "onnxruntime")
    int8 = with_random_exits(folder, store, "int8", "int8")
    runtimes = [Model(int8, "onnxruntime"), Model(int8)]
    is_native = family not in ("electra", "deberta-v2", "distilbert")  # the last has other sizes
    assert runtimes[1].runtime == ("native" if is_native else "onnxruntime")
    for text in TEXTS[-3:]:
        tokens = plain.tokenize(text)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64, padding=False)
        assert tokens.ids[0].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected = theirs(**inputs).logits[0].numpy()
        steps = plain.full_depth(tokens)
        np.testing.assert_allclose(steps[-1].logits, expected, atol=2e-4)
        others = [model.full_depth(tokens) for model in runtimes]
        for layer, step in enumerate(steps):
            assert step.logits is not None and step.logits.shape == (len(tokens), len(TAGS))
            for model, other in zip(runtimes, others, strict=True):
                # Exits are in fp32; the states that they read are not.
                found, _ = model.exits.run(layer, step.hidden)
                np.testing.assert_allclose(found, step.logits, atol=1e-4)
                assert np.abs(other[layer].logits - step.logits).mean() < 0.1 * np.ptp(step.logits)


def test_a_finished_text_keeps_no_logits(model: Model) -> None:
    """A batch of long texts would otherwise hold gigabytes until it is answered."""
    texts = [*TEXTS[-3:], " ".join(TEXTS)]
    rule = ExitRule(0.5, model.manifest.default_signal, kind=model.manifest.kind)
    job = jobs.job(texts, [0.0] * len(texts), model=model, rule=rule, windows=16)
    found = [one for item in job.items for one in run(item, WorkQueue(1)) or []]
    readings = [reading for one in found for reading in (*one.passed, one.reading)]
    assert any(reading.tokens.spans for reading in readings if reading.tokens)
    assert found[-1].num_windows > 1 and len(readings) > 2 * len(texts)
    assert all(reading.tokens is None or not reading.tokens.logits.size for reading in readings)


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (None, True),
        (SpanOptions(aggregation="simple", templates={}), True),
        (SpanOptions(aggregation="first"), False),
        (SpanOptions(kept=["X"]), False),
        (SpanOptions(ignored=["X"]), False),
        (SpanOptions(min_score=0.5), False),
        (SpanOptions(merges=True), True),
    ],
)
def test_a_certificate_is_of_the_models_own_spans(
    model: Model, options: SpanOptions | None, holds: bool
) -> None:
    rule = ExitRule(0.1, model.manifest.default_signal, kind=model.manifest.kind)
    choice = Choice(rule, "max_disagreement", 0.05, certificate={"bound": 0.05})
    found = with_spans(choice, Request([Text("good")], spans=options), model.manifest)
    assert (found.certificate is not None) == holds


# Over HTTP


@pytest.fixture(scope="module")
def server(kernels: Any, tagged: Path) -> Iterator[Server]:
    with serving(tagged, models=["tags", "mood"], default_model="tags", threads=2) as running:
        yield running


def data_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    rows: list[dict[str, Any]] = response.json()["data"]
    return rows


def alone(
    model: Model, text: str, tau: float = 0.0, deepest: int = 3, aggregation: Aggregation = "simple"
) -> Reading:
    """The answer of the model to a short text, run alone in Python."""
    rule = ExitRule(tau, model.manifest.default_signal, kind=Spans(SpanRule(TAGS, aggregation)))
    tokens = model.tokenize(text)
    decision = Decision(model.exits, rule, deepest, layout=tokens.layout)
    LayerByLayer(model.encoder.layers)([ForwardPass(tokens, [decision])])
    return decision.readings[-1]


def spans_of(reading: Reading, text: str) -> list[dict[str, Any]]:
    return [
        {"start": start, "end": end, "label": label, "score": round(score, 6), "text": text[start:end]}
        for start, end, label, score in reading.spans
    ]


def without_texts(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in span.items() if key != "text"} for span in spans]


def test_a_response_has_a_limited_number_of_spans(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    count = sum(len(row["spans"]) for row in data_of(server.classify(input=TEXTS)))
    explained: dict[str, Any] = {"explain": True, "tau": 0}
    for limit, texts, options, is_refused in (
        (count, TEXTS, {}, False),
        (count - 1, TEXTS, {}, True),
        (count - 1, TEXTS, {"redact": True}, True),
        (count - 1, TEXTS, explained, True),
        (1, TEXTS[-1], {}, False),  # one text is always answered
        (1, TEXTS[-1], explained, True),
    ):
        monkeypatch.setattr("de3.server.infer.MAX_SPANS", limit)
        response = server.classify(input=texts, **options)
        assert response.status_code == (422 if is_refused else 200)
        if is_refused:
            error = response.json()["error"]
            assert error["param"] == "input" and f"at most {limit} are allowed" in error["message"]


@pytest.mark.parametrize(
    ("tau", "deepest", "aggregation"), [(0.0, 3, "simple"), (0.5, 3, "first"), (0.4, 2, "max")]
)
def test_an_answer_in_a_batch_has_the_spans_of_the_text_alone_and_no_label(
    server: Server, model: Model, tau: float, deepest: int, aggregation: Aggregation
) -> None:
    body = server.described(input=TEXTS, tau=tau, max_layer=deepest, aggregation=aggregation)
    for text, row in zip(TEXTS, body["data"], strict=True):
        expected = alone(model, text, tau, deepest, aggregation)
        assert row["exit"]["layer"] == expected.layer and row["spans"] == spans_of(expected, text)
        assert not {"label", "probs", "text", "top"} & row.keys() and row["num_classes"] == len(TAGS)
        assert row["exit"]["signal"] == "risk" and row["exit"]["entropy"] is None
    layers = {row["exit"]["layer"] for row in body["data"]}
    assert (layers == {3}) if tau == 0 else len(layers) > 1


def test_labels_scores_and_aggregation_choose_the_spans(server: Server) -> None:
    (all_,) = data_of(server.classify(input=TEXTS[-1], min_score=0))
    spans = all_["spans"]
    assert {span["label"] for span in spans} == {"X", "Y"}
    for options, wanted in (
        ({"labels": ["X"]}, lambda span: span["label"] == "X"),
        ({"min_score": 0.5}, lambda span: span["score"] >= 0.5),
        ({"min_score": {"X": 0.4}}, lambda span: span["label"] == "Y" or span["score"] >= 0.4),
    ):
        (row,) = data_of(server.classify(input=TEXTS[-1], **options))
        assert row["spans"] == [span for span in spans if wanted(span)]
    (row,) = data_of(server.classify(input=TEXTS[-1], aggregation="none", labels=["B-X", "I-Y"]))
    assert {span["label"] for span in row["spans"]} <= {"B-X", "I-Y"}


def test_explain_reports_the_spans_of_each_exit(server: Server, model: Model) -> None:
    text = TEXTS[-1]
    row = server.described(input=text, tau=0, explain=True)["data"][0]
    expected = [spans_of(alone(model, text, deepest=layer), text) for layer in range(4)]
    assert [one["spans"] for one in row["layers"]] == expected and row["spans"] == expected[-1]
    private = server.described(input=text, tau=0, explain=True, redact=True)["data"][0]
    # Without the words to be redacted.
    assert [one["spans"] for one in private["layers"]] == [without_texts(one) for one in expected]


@pytest.mark.parametrize(
    ("options", "field", "says"),
    [
        ({"labels": ["X", "Z"]}, "labels", "finds no 'Z'; it finds X, Y"),
        ({"labels": ["X", "O"], "redact": True}, "labels", "finds no 'O'; it finds X, Y"),
        ({"labels": ["X"], "aggregation": "none"}, "labels", "finds no 'X'; it finds B-X, B-Y, I-X, I-Y"),
        ({"min_score": {"Z": 0.5}}, "min_score", "finds no 'Z'; it finds X, Y"),
        ({"min_score": 1.5}, "min_score", "must be a number from 0 to 1"),
        ({"redact": {"Z": "-"}}, "redact", "finds no 'Z'; it finds X, Y"),
        ({"redact": {"X": "-" * 101}}, "redact", "must be a text of at most 100 characters"),
        ({"redact": "yes"}, "redact", "must be true, or an object of up to 10000 templates by label"),
        ({"redact": True, "truncate": True}, "redact", "contradicts truncate: true"),
        ({"redact": True, "models": ["tags", "mood"]}, "redact", "cannot be combined with models"),
        ({"aggregation": "mean"}, "aggregation", "should be 'none', 'simple', 'first', 'average' or 'max'"),
        ({"signal": "edr"}, "signal", "edr needs one answer for a text, and tags"),
        ({"top_k": 1}, "top_k", "is a token classifier: a text has no probabilities"),
        ({"flag": "X"}, "flag", "tags is a token classifier"),
    ],
)
def test_invalid_options_are_refused_with_the_field_and_what_is_allowed(
    server: Server, options: dict[str, Any], field: str, says: str
) -> None:
    response = server.classify(input="good", **options)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["param"] == field and error["message"].startswith(field) and says in error["message"]


def test_pairs_and_other_kinds_of_models_are_refused(server: Server) -> None:
    response = server.classify(input={"text": "good", "text_pair": "bad"})
    assert response.status_code == 422 and "takes single texts, but this is a pair" in response.text
    for options in ({"aggregation": "max"}, {"labels": ["calm"]}, {"min_score": 0.1}, {"redact": True}):
        response = server.classify(model="mood", input="good", **options)
        assert response.status_code == 422, response.text
        assert "mood:1 is not a token classifier: it finds no spans" in response.text


# Redaction


def test_redaction_returns_the_text_without_its_spans(server: Server, model: Model) -> None:
    for redact, templates in (
        (True, {"X": "[X]", "Y": "[Y]"}),
        ({"X": "<x>", "Y": ""}, {"X": "<x>", "Y": ""}),
    ):
        data = server.described(input=TEXTS, redact=redact)["data"]
        for row, text in zip(data, TEXTS, strict=True):
            reading, made, at = alone(model, text), "", 0
            assert reading.tokens is not None
            for span in merged(reading.tokens.spans):
                made += text[at : span.start] + templates[span.label]
                at = span.end
            assert row["text"] == made + text[at:]
            places = [(span["start"], span["end"], span["label"]) for span in row["spans"]]
            assert places == [span[:3] for span in merged(reading.tokens.spans)]
            assert not any("text" in span for span in row["spans"])
    (row,) = data_of(server.classify(input=TEXTS[-1], redact=False))
    assert "text" not in row


def test_a_long_text_is_redacted_in_windows_whatever_its_budget(server: Server) -> None:
    text = " ".join(TEXTS[:40])
    (plain,) = data_of(server.classify(input=text))
    budget = {"latency_budget_ms": 1, "best_effort": True}
    for options in ({}, budget, {"long": "windows"}, {"long": "error"}):
        (row,) = data_of(server.classify(input=text, redact=True, **options))
        assert row["windows"]["run"] == row["windows"]["of"] > 1 and "truncated" not in row
        assert row["spans"] == without_texts(plain["spans"])
        assert row["exit"]["reason"] == "last_layer"


def test_an_error_tells_nothing_of_a_text_that_was_to_be_redacted(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for text in ("very " * 1000 + SECRET, f"{SECRET} " + "very " * 60_000):
        for options in ({}, {"truncate": False}, {"long": "windows"}):
            response = server.classify(input=["good", text], redact=True, **options)
            assert response.status_code == 422
            error = response.json()["error"]
            assert error["param"] == "input[1]" and "the maximum" in error["message"]
            assert "very" not in response.text and "superb" not in response.text
    for options in ({"labels": ["Z"]}, {"aggregation": "mean"}, {"tau": 2}, {"truncate": True}, {"top_k": 1}):
        response = server.classify(input=["good", SECRET], redact=True, **options)
        assert response.status_code == 422 and "superb" not in response.text
    assert "superb" not in caplog.text and "very very" not in caplog.text


def test_long_texts_are_read_in_windows_unless_they_are_truncated(server: Server) -> None:
    text = " ".join(TEXTS[:30])
    (row,) = data_of(server.classify(input=text))
    assert row["windows"]["run"] == row["windows"]["of"] > 1
    assert any(span["start"] > 400 for span in row["spans"])
    for span, after in pairwise(row["spans"]):
        assert span["start"] <= after["start"] and span["text"] == text[span["start"] : span["end"]]
    for options in ({"long": "truncate"}, {"truncate": True}):
        (cut,) = data_of(server.classify(input=text, **options))
        assert cut["truncated"] and "windows" not in cut
        assert all(span["end"] < 400 for span in cut["spans"])
    for options in ({"long": "error"}, {"truncate": False}):
        response = server.classify(input=text, **options)
        assert response.status_code == 422 and "the maximum is" in response.text
    (row,) = data_of(server.classify(input=" ".join(TEXTS * 30)))
    assert row["truncated"] and row["windows"]["run"] == 16


def test_a_classifier_and_a_token_classifier_answer_on_one_pass_as_alone(server: Server) -> None:
    names = ["mood", "tags"]
    for options in ({"tau": 0.3}, {"explain": True}):
        body = server.described(models=names, input=TEXTS, **options)
        for name, result in zip(names, body["results"], strict=True):
            assert result["data"] == data_of(server.classify(model=name, input=TEXTS, **options))
    long_ = " ".join(TEXTS[:30])
    both = server.described(models=names, input=long_)["results"]
    assert both[0]["data"] == data_of(server.classify(model="mood", input=long_))
    assert both[1]["data"][0]["truncated"]  # one pass: a classifier's texts are truncated
    both = server.described(models=names, input=long_, long="windows")["results"]
    assert both[1]["data"][0]["spans"] == data_of(server.classify(input=long_))[0]["spans"]
