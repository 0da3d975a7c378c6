"""Token classifiers: every runtime, group and pass finds the same spans; over HTTP, their fields, limits and errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from de3.exits.rule import ExitRule
from de3.exits.signals import Risk
from de3.exits.spans import AGGREGATIONS
from de3.export.fit import Exits
from de3.export.publish import write_exits
from de3.model_store.families import FAMILIES
from de3.model_store.forward import Decision, ForwardPass, LayerByLayer
from de3.model_store.manifest import Defaults
from de3.model_store.model import Model
from de3.model_store.store import Store
from tests.fixtures import TAGS, made_once, make_rows
from tests.stock import token_classifier, with_random_exits

TEXTS = [
    "good",
    *(text for text, _ in make_rows(40, 9)),
    "A film: not bads, qxz 👍🏽 e\u0301\r\nfun [SEP] good!",
]
SECRET = "superb charming tired"  # words of the tokenizer


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a token classifier with random exits, tags:1 (fp32) and tags-int8:1, and others (see below).

    On the encoders of these, pairs and pairs-int8 are classifiers without prefixes; plain has no exits but the last.
    """

    def make(folder: Path) -> None:
        stock, store = token_classifier(tmp_path_factory, "bert"), Store(folder)
        for name, precision in (("tags", "fp32"), ("tags-int8", "int8")):
            with_random_exits(stock, store, name, precision)  # type: ignore[arg-type]
            base, rng = store.open(name), np.random.default_rng(5)
            linear = [
                (rng.normal(0, 0.5, (3, 64)).astype(np.float32), np.zeros(3, np.float32)) for _ in range(4)
            ]
            other = name.replace("tags", "mood")
            with store.new_version(other) as draft:
                exits = Exits("mean", linear, [], [], has_last=True)
                fields: dict[str, Any] = {
                    "labels": ["calm", "glad", "sad"],
                    "aggregation": None,
                    "risk": None,
                }
                fields |= {"defaults": Defaults(tau=0, signal="entropy"), "source": None}
                draft.publish(write_exits(base, exits, draft, name=other, **fields))

    return made_once(tmp_path_factory, "tagged", make)


@pytest.fixture(scope="module")
def models(kernels: Any, tagged: Path) -> dict[str, Model]:
    """The same token classifier on the kernels and on ONNX Runtime."""
    found = {"native": Model(Store(tagged).open("tags-int8"), "native")}
    return found | {"onnxruntime": Model(Store(tagged).open("tags"), "onnxruntime")}


# Models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_exit_gives_the_same_logits_on_every_runtime_and_the_last_those_of_transformers(
    family: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = token_classifier(tmp_path_factory, family)
    store = Store(tmp_path)
    theirs = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = Model(with_random_exits(folder, store, "plain", "fp32"), "onnxruntime")
    int8 = with_random_exits(folder, store, "int8", "int8")
    runtimes = [Model(int8, "onnxruntime"), Model(int8)]
    is_native = family not in ("electra", "deberta-v2", "distilbert")  # the last has other sizes
    assert runtimes[1].runtime == ("native" if is_native else "onnxruntime")
    for text in TEXTS[-12:]:
        tokens = plain.tokenize(text)
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64, padding=False)
        assert tokens.ids[0].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected = theirs(**inputs).logits[0].numpy()
        steps = plain.full_depth(tokens)
        np.testing.assert_allclose(steps[-1].logits, expected, atol=2e-4)
        first, second = (model.full_depth(tokens) for model in runtimes)
        for layer, step in enumerate(steps):
            assert step.logits is not None and step.logits.shape == (len(tokens), len(TAGS))
            spread = np.ptp(step.logits)
            for other in (first, second):
                assert np.abs(other[layer].logits - step.logits).mean() < 0.1 * spread
            assert np.abs(first[layer].logits - second[layer].logits).mean() < 0.02 * spread
    # The pipeline reads the text as the tokenizer in transformers truncates it.
    pipe = pipeline("token-classification", model=theirs, tokenizer=tokenizer)
    for text in TEXTS[-12:]:
        for aggregation in AGGREGATIONS:
            rule = plain.manifest.span_rule
            assert rule is not None and rule.aggregation == "simple"
            tokens = plain.tokenize(text)
            rule = type(rule)(rule.labels, aggregation)
            found = rule.spans(plain.full_depth(tokens)[-1].logits, tokens.layout)  # type: ignore[arg-type]
            wanted = pipe(text, aggregation_strategy=aggregation)
            group = "entity" if aggregation == "none" else "entity_group"
            assert [span[:3] for span in found] == [(one["start"], one["end"], one[group]) for one in wanted]
            scores = [float(one["score"]) for one in wanted]
            assert [span.score for span in found] == pytest.approx(scores, abs=1e-3)


def outcome(one: Decision) -> list[Any]:
    """The result of a decision, which NaN equals itself in."""
    last = one.readings[-1]
    assert last.tokens is not None
    scores = [(reading.layer, repr(reading.unsure), repr(reading.score)) for reading in one.readings]
    return [one.reason, scores, last.tokens.logits.tobytes(), last.tokens.spans]


def passes_of(model: Model, texts: list[str], rules: list[ExitRule], deepest: int) -> list[ForwardPass]:
    tokens = [model.tokenize(text) for text in texts]
    return [
        ForwardPass(t, [Decision(model.exits, rule, deepest, layout=t.layout)])
        for t, rule in zip(tokens, rules, strict=True)
    ]


@pytest.mark.parametrize("runtime", ["native", "onnxruntime"])
@settings(max_examples=60)
@given(
    batch=st.lists(
        st.tuples(
            st.sampled_from(TEXTS), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.sampled_from(AGGREGATIONS)
        ),
        min_size=1,
        max_size=8,
    ),
    deepest=st.integers(0, 3),
    layers=st.integers(1, 4),
)
def test_a_text_exits_in_a_group_preempted_and_alone_with_the_same_bits(
    models: dict[str, Model], runtime: str, batch: list[tuple[str, float, Any]], deepest: int, layers: int
) -> None:
    model = models[runtime]
    rule = model.manifest.span_rule
    assert rule is not None
    signal = model.manifest.default_signal
    assert isinstance(signal, Risk)
    rules = [ExitRule(tau, signal, spans=type(rule)(rule.labels, how)) for _, tau, how in batch]
    together, alone = (passes_of(model, [text for text, *_ in batch], rules, deepest) for _ in range(2))
    forward = model.encoder.forward or model.encoder.layer_by_layer
    while left := [one for one in together if not one.is_done]:
        forward(left, layers=layers)
    model.encoder.layer_by_layer(alone)
    for [a], [b] in zip((p.decisions for p in together), (p.decisions for p in alone), strict=True):
        assert outcome(a) == outcome(b)
        assert len({reading.layer for reading in a.readings}) == len(a.readings)


def test_random_exits_are_used_at_every_layer(models: dict[str, Model]) -> None:
    """Otherwise the tests above would show little."""
    for model in models.values():
        rule, signal = model.manifest.span_rule, model.manifest.default_signal
        rules = [ExitRule(0.5, signal, spans=rule)] * len(TEXTS)
        passes = passes_of(model, TEXTS, rules, 3)
        LayerByLayer(model.encoder.layers)(passes)
        layers = [one.decisions[0].readings[-1].layer for one in passes]
        assert {0, 1, 3} <= set(layers) or {0, 2, 3} <= set(layers), layers
        assert any(one.decisions[0].readings[-1].tokens.spans for one in passes)  # type: ignore[union-attr]
