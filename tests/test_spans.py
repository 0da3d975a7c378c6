"""Spans: how they are made from token labels, compared with transformers' pipeline; offsets, windows and redaction."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertForTokenClassification, TokenClassificationPipeline

from de3.exits.kinds import Spans
from de3.exits.reading import read_tokens
from de3.exits.signals import Risk
from de3.exits.spans import (
    AGGREGATIONS,
    Aggregation,
    Layout,
    Span,
    SpanRule,
    redacted,
    unsure_of,
)
from de3.exits.windows import combination
from de3.model_store.tokenizer import TextTokenizer, Windows
from tests.fixtures import TAGS, save_family_tokenizer

# Why the pipeline finds other words than the text's, without WordPiece; so do we.
pytestmark = pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
Array = NDArray[np.float32]


class Tokenizers(NamedTuple):
    """A tokenizer, ours that is made of it, and transformers' pipelines with it, by labels."""

    inner: Tokenizer
    ours: TextTokenizer
    pipelines: dict[tuple[str, ...], TokenClassificationPipeline]


# Families whose tokenizers are of different kinds: WordPiece, byte-level BPE and Unigram.
TOKENIZERS = ("bert", "roberta", "xlm-roberta")
LABELS = (
    TAGS,
    ("X", "O", "Y"),
    ("B-X", "I-X", "B-Y", "I-Y"),
    ("O", "X", "B-X", "I-X", "B-", "I-O", "E-X", "S-Y"),
)
PARTS = ["good", "films", "bads", "qxz", " ", "  ", "\r\n", "\t", "\u3000", ".", "?!", "'", "-", "good-bad"]
PARTS += ["👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "e\u0301", "é", "Å", "ﬁ", "ﬁlm", "İ", "ß", "½", "中文"]
PARTS += ["の", "한국", "ا", "\u0301", "\u200b", "\u200d", "\ufeff", "\xad", "\x00", "\x07", "\x85", "\ufffd"]
PARTS += ["[SEP]", "[UNK]", "[CLS]", "<s>", "</s>", "<unk>", "▁", "▁good", "Ġ"]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), min_size=1, max_size=30).map("".join)


def pipeline(tokenizer: Any, labels: Sequence[str]) -> TokenClassificationPipeline:
    """transformers' pipeline, whose model is never run."""
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    config = BertConfig(vocab_size=4, **sizes, id2label=dict(enumerate(labels)))
    return TokenClassificationPipeline(model=BertForTokenClassification(config), tokenizer=tokenizer)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    folder = tmp_path_factory.mktemp(request.param)
    save_family_tokenizer(folder, request.param)
    inner, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    inner.no_padding()
    inner.no_truncation()
    return Tokenizers(
        inner, TextTokenizer(inner, 64), {labels: pipeline(theirs, labels) for labels in LABELS}
    )


def logits_of(tokens: int, labels: int, seed: int, kind: str) -> Array:
    """Random logits (tokens, labels): of any size, with many ties, or with labels that two tokens share."""
    rng = np.random.default_rng(seed)
    if kind == "tied":
        return rng.integers(0, 2, (tokens, labels)).astype(np.float32)
    if kind == "close":
        return (1 + rng.normal(0, 0.1, (tokens, labels))).astype(np.float32)
    return rng.normal(0, 4, (tokens, labels)).astype(np.float32)


logit_kinds = st.sampled_from(["any", "tied", "close"])
seeds = st.integers(0, 2**32 - 1)


# Parity with transformers


@settings(max_examples=80)
@given(st.data(), st.sampled_from(LABELS), texts, st.sampled_from(AGGREGATIONS), seeds, logit_kinds)
def test_spans_are_those_of_transformers_pipeline(
    tokenizer: Tokenizers,
    data: st.DataObject,
    labels: tuple[str, ...],
    text: str,
    aggregation: Aggregation,
    seed: int,
    kind: str,
) -> None:
    rule, pipe = SpanRule(labels, aggregation, ignored=frozenset()), tokenizer.pipelines[labels]
    ignored = data.draw(st.sets(st.sampled_from(rule.names)) | st.just({"O"}), "ignored")
    names = {"O", *(name for name in ignored if name)}
    (inputs,) = pipe.preprocess(text, is_split_into_words=False, tokenizer_params={"max_length": 64})
    tokens = tokenizer.ours.start(text, None, True, 1, True).all()
    assert tokens.ids[0].tolist() == inputs["input_ids"][0].tolist()
    layout = tokens.layout
    assert layout is not None
    assert layout.is_special.tolist() == inputs["special_tokens_mask"][0].bool().tolist()
    assert layout.offsets.tolist() == inputs["offset_mapping"][0].tolist()
    logits = logits_of(len(tokens), len(labels), seed, kind)
    outputs = {**inputs, "logits": torch.tensor(logits[None])}
    expected = pipe.postprocess([outputs], aggregation, ignore_labels=sorted(names))
    found = SpanRule(labels, aggregation, ignored=frozenset(names)).spans(logits, layout)
    group = "entity" if aggregation == "none" else "entity_group"
    assert [span[:3] for span in found] == [(one["start"], one["end"], one[group]) for one in expected]
    scores = [float(one["score"]) for one in expected]
    assert [span.score for span in found] == pytest.approx(scores, abs=1e-6)


def test_a_mean_of_ignored_labels_may_be_another_label() -> None:
    layout = Layout(np.array([[0, 1], [1, 2]], np.int32), np.zeros(2, np.bool_), np.array([False, True]))
    logits = np.log(np.float32([[0.5, 0.01, 0.49], [0.01, 0.5, 0.49]]))
    rule = SpanRule(("O", "X", "Y"), "average", ignored=frozenset({"O", "X"}))
    assert [span[:3] for span in rule.spans(logits, layout)] == [(0, 2, "Y")]


def test_parts_are_merged_before_their_scores_count_and_only_labels_that_are_asked_for_are_returned() -> None:
    layout = Layout(np.array([[0, 1], [1, 2], [2, 3]], np.int32), np.zeros(3, bool), np.zeros(3, bool))
    logits = np.log(np.float32([[0.1, 0.9, 0.0001], [0.4, 0.6, 0.0001], [0.3, 0.0001, 0.7]]))
    first, second, other = (0, 1, "X"), (1, 2, "X"), (2, 3, "Y")
    for scores, merges, kept, expected in (
        ({}, False, None, [first, second, other]),
        ({"X": 0.8}, False, None, [first, other]),
        ({"": 0.65}, False, None, [first, other]),
        ({"X": 0.0, "": 0.8}, False, None, [first, second]),
        ({"X": 0.8}, True, None, [(0, 2, "X"), other]),
        ({}, True, frozenset("Y"), [other]),
    ):
        rule = SpanRule(("O", "B-X", "B-Y"), "simple", kept, min_scores=scores, merges=merges)
        assert [span[:3] for span in rule.spans(logits, layout)] == expected


# Windows


def read_in_windows(rule: SpanRule, windows: Windows, logits: Sequence[Array]) -> list[Span]:
    """The spans of a text that is read in windows with these logits."""
    combined = combination(Spans(rule), windows.spans)
    for n, values in enumerate(logits):
        assert not combined.is_settled()
        layout = windows[n].layout
        assert layout is not None
        combined.add(reading := read_tokens(3, values, layout, rule))
    assert combined.is_settled()
    return list(combined.reading(reading).spans)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(PARTS), min_size=30, max_size=200), seeds, st.data())
def test_spans_in_windows_are_those_of_the_joined_tokens(
    tokenizer: Tokenizers, parts: list[str], seed: int, data: st.DataObject
) -> None:
    """Of a token in two windows, the logits are those of the window in which more tokens are beyond it."""
    ours = TextTokenizer(tokenizer.inner, data.draw(st.integers(6, 30), "max_tokens"))
    windows = ours.start("".join(parts), None, True, 16, True).all()
    if not isinstance(windows, Windows):
        return
    rule = SpanRule(TAGS, data.draw(st.sampled_from(AGGREGATIONS), "aggregation"))
    count, before = windows.spans[-1].end, len(ours.frames[False].before)
    logits = [logits_of(len(windows[n]), len(TAGS), seed + n, "close") for n in range(len(windows))]
    joined = np.zeros((count, len(TAGS)), np.float32)
    for token in range(count):
        # Characters of context are worth most on the shorter side, up to the edge that cuts the text.
        context = {
            n: min(
                token - span.start if n > 0 else math.inf,
                span.end - 1 - token if n < len(windows) - 1 else math.inf,
            )
            for n, span in enumerate(windows.spans)
            if span.start <= token < span.end
        }
        best = max(context, key=lambda n: (context[n], n))
        joined[token] = logits[best][before + token - windows.spans[best].start]
    assert windows.is_subword is not None
    whole = Layout(windows.offsets[:count], np.zeros(count, np.bool_), windows.is_subword[:count])
    assert read_in_windows(rule, windows, logits) == rule.spans(joined, whole)


# Redaction


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.sampled_from("XYZ")), max_size=8),
    st.dictionaries(st.sampled_from("XYZ"), st.text("<>xyz", max_size=5)),
)
def test_no_character_of_a_span_is_left_and_all_others_are(
    bounds: list[tuple[int, int, str]], templates: dict[str, str]
) -> None:
    text = "".join(chr(0x4E00 + n) for n in range(20))
    found = [Span(min(a, b), max(a, b), label, 0.5) for a, b, label in bounds]
    inside = {n for span in found for n in range(span.start, span.end)}
    left = [c for c in redacted(text, found, templates) if c in text]
    assert left == [c for n, c in enumerate(text) if n not in inside]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], "abcdefgh"),
        ([(1, 3, "X"), (5, 6, "Y")], "a[X]de[Y]gh"),
        ([(1, 3, "X"), (3, 4, "X")], "a[X]efgh"),  # one span in two parts
        ([(1, 3, "X"), (3, 4, "Y")], "a[X][Y]efgh"),
        ([(1, 3, "X"), (2, 6, "Y")], "a[Y]gh"),  # the longer's label
        ([(1, 6, "X"), (2, 3, "Y")], "a[X]gh"),
        ([(2, 3, "Y"), (1, 6, "X"), (5, 8, "Z")], "a[X]"),
        ([(0, 8, "X")], "[X]"),
    ],
)
def test_overlapping_spans_are_replaced_together(found: list[tuple[int, int, str]], expected: str) -> None:
    spans = [Span(*one, 1.0) for one in found]
    assert redacted("abcdefgh", spans) == redacted("abcdefgh", spans[::-1]) == expected
    templates = {"X": "<x>", "Y": ""}
    assert redacted("abcdefgh", spans, templates) == expected.replace("[X]", "<x>").replace("[Y]", "")


# The uncertainty of a text


def test_only_tokens_that_can_change_a_span_are_counted() -> None:
    layout = Layout(np.zeros((4, 2), np.int32), np.array([1, 0, 0, 1], bool), np.array([0, 0, 1, 0], bool))
    for aggregation in AGGREGATIONS:
        is_any = aggregation != "first"
        assert SpanRule(TAGS, aggregation).counted(layout).tolist() == [False, True, is_any, False]


extremes = [0.0, 1.0, -1000.0, 3e38, math.inf, -math.inf, math.nan]
values = st.floats(-50, 50, width=32) | st.sampled_from(extremes)


@given(
    labels=st.integers(2, 100),
    tokens=st.integers(1, 100),
    outside=st.integers(-1, 3),
    seed=seeds,
    spread=st.sampled_from([0.0, 0.1, 3.0, 40.0, 1e30]),
    special=st.lists(st.tuples(seeds, values), max_size=3),
    counts=st.sampled_from([0.0, 0.5, 1.0]),
    weights=st.lists(st.floats(-3, 3), min_size=5, max_size=5),
)
def test_the_kernels_uncertainty_is_that_of_python(
    kernels: Any,
    labels: int,
    tokens: int,
    outside: int,
    seed: int,
    spread: float,
    special: list[tuple[int, float]],
    counts: float,
    weights: list[float],
) -> None:
    """Bit for bit. With NaN, only the number of tokens and the score, which is NaN, are defined."""
    rng = np.random.default_rng(seed)
    logits = (spread * rng.normal(size=(tokens, labels))).astype(np.float32)
    for place, value in special:
        logits.flat[place % logits.size] = value
    counted = rng.random(tokens) < counts
    with np.errstate(all="ignore"):
        ours = unsure_of(logits, counted, outside)
        layout = Layout(np.zeros((tokens, 2), np.int32), ~counted, np.zeros(tokens, np.bool_))
        rule = SpanRule(tuple("O" if k == outside else f"L{k}" for k in range(labels)))
        reading = read_tokens(0, logits, layout, rule)
        assert outside >= labels or reading.unsure == ours or math.isnan(ours.total)
        score = Risk((tuple(weights), None)).score([reading])
    found, unsure = kernels.score_tokens(logits, counted.view(np.uint8), labels, outside, np.array(weights))
    assert score is not None
    assert unsure[2] == ours.tokens == counted.sum()
    if np.isnan(logits[counted]).any():
        assert math.isnan(ours.total) and math.isnan(unsure[1]) and math.isnan(score) and math.isnan(found)
        return
    np.testing.assert_array_equal(np.array(unsure, np.float64), np.array(ours, np.float64))
    np.testing.assert_array_equal(found, score)
    finite = np.isfinite(logits[counted])
    if finite.all() and counted.any():
        wide = logits[counted].astype(np.float64)
        odds = np.exp(wide - wide.max(-1, keepdims=True))
        # The sum of the others: one minus the largest probability has no exact digits near 0.
        expected = np.sort(odds, -1)[:, :-1].sum(-1) / odds.sum(-1)
        assert ours.largest == pytest.approx(expected.max(), rel=1e-5, abs=1e-30)
        assert ours.total == pytest.approx(expected.sum(), rel=1e-5, abs=1e-30)
