"""The studies of token classifiers, on small models and few texts."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from de3.exits import kinds
from de3.exits.spans import Span
from de3.export.classifier import Stock, convert
from de3.export.full_depth import export_full_depth
from de3.loadtest.servers import PEERS, Server
from de3.model_store.model import Model
from de3.model_store.store import Store
from lab.spans import Spans, chars, rates, recall
from lab.spans import parity as study
from lab.spans.speed import Side, measure, table
from tests.fixtures import make_rows

TEXTS = [f"{text} Zoë Müller, 12 Mill Road" for text, _ in make_rows(40, 5)]


def test_the_rates_count_texts_and_the_recall_counts_characters() -> None:
    none: Spans = frozenset()
    expected = [frozenset({(0, 4, "A"), (6, 8, "B")}), none, frozenset({(0, 2, "A")}), none]
    given = [frozenset({(0, 4, "A")}), frozenset({(0, 1, "A")}), frozenset({(0, 2, "A"), (5, 9, "A")}), none]
    assert rates(expected, given) == (3 / 4, 1 / 2), "a span too many is no missed one"
    assert chars(expected[0]) == {0, 1, 2, 3, 6, 7}
    assert recall(expected, given) == 6 / 8
    assert recall([none], [frozenset({(0, 3, "A")})]) == 1.0 and rates([], []) == (0.0, 0.0)


def test_spans_in_another_place_or_with_another_label_never_count_as_equal() -> None:
    one = [Span(0, 4, "A", 0.9), Span(5, 6, "B", 0.5)]
    assert study._gap(one, [one[0], one[1]._replace(score=0.4)]) == pytest.approx(0.1)
    for other in ([one[0]], [one[0], one[1]._replace(label="C")], [one[0], one[1]._replace(end=7)]):
        assert study._gap(one, other) == float("inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.random_model(tmp_path_factory.mktemp("random") / "roberta", "roberta", TEXTS)


@pytest.mark.slow
def test_spans_equal_those_of_transformers(model: Path) -> None:
    results = list(study.compare("random", model, study.with_odd(TEXTS)))
    assert [one.unlike for one in results] == [0] * 5
    assert all(one.found > len(TEXTS) and one.largest < study.TOLERANCE for one in results)


def test_the_peer_finds_the_spans_of_full_depth(model: Path, tmp_path: Path) -> None:
    """In fp32, where both compute the same, in different programs."""
    convert(Stock.open(str(model), model), Store(tmp_path / "store"), "m", "fp32")
    artifact = Store(tmp_path / "store").open("m")
    export_full_depth(artifact.path, tmp_path / "graph", int8=False)
    opened, kind = Model(artifact, "onnxruntime"), artifact.manifest.kind
    expected = []
    for text in TEXTS:
        tokens = opened.tokenize(text)
        logits = opened.full_depth(tokens)[-1].logits
        assert isinstance(kind, kinds.Spans) and tokens.layout is not None and logits is not None
        expected.append(kind.rule.spans(logits, tokens.layout))
    sys.path.insert(0, str(PEERS))
    try:
        from spans_app import SpanGraph

        peer = SpanGraph(tmp_path / "graph")
    finally:
        sys.path.remove(str(PEERS))
    for text, spans in zip(TEXTS, expected, strict=True):
        found = peer(text)["spans"]
        assert [(one["start"], one["end"], one["label"]) for one in found] == [span[:3] for span in spans]
        assert np.allclose([one["score"] for one in found], [span.score for span in spans], atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_sides_are_measured_in_turn(model: Path, tmp_path: Path) -> None:
    def serve(name: str, quantize: str) -> Side:
        command = [sys.executable, "-P", "-m", "de3.cli", "serve", str(model), "--quantize", quantize]
        return Side(Server(name, [*command, "--port", "{port}"], ready="/ready"))

    broken = Side(Server("broken", [], script="no_such_peer"))
    sides, lines = [serve("fp32", "none"), broken, serve("int8", "int8")], list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "prepare", _prepare)
        measure(sides, TEXTS, 1, 1, 8123, lines.append)
    assert [side.server.name for side in sides] == ["fp32", "int8"] and lines[0] == "left out: broken"
    assert all(len(side.rates) == len(side.p50_ms) == 1 and side.rates[0] > 0 for side in sides)
    assert sides[0].unlike == 0.0 and sides[0].tau == 0.0
    columns, rows = table(sides)
    assert all(len(row) == len(columns) for row in rows)
    json.dumps([side.rates for side in sides])


def _prepare(server: Server) -> None:
    if server.script:
        raise ValueError(server.name)
