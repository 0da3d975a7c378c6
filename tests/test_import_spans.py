"""Import of token classifiers; their two kinds of disagreement; heads that are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from de3.exits import bound, calibration
from de3.exits.calibration import Samples
from de3.exits.criteria import criteria_of
from de3.exits.kinds import Spans
from de3.exits.recorded import RecordedSpans
from de3.exits.signals import Risk
from de3.exits.spans import SpanRule
from de3.export.cache import artifact_of
from de3.model_store.store import Store
from tests.commands import de3, refusal
from tests.fixtures import TAGS, make_rows, save_encoder
from tests.serving import serving
from tests.stock import token_classifier

NONE, X, Y = frozenset[Any](), frozenset({(0, 1, "X")}), frozenset({(0, 1, "X"), (2, 3, "Y")})


def recorded(rows: list[list[frozenset[Any]]], original: list[frozenset[Any]] | None = None) -> RecordedSpans:
    """The answers of exits 0 and 1 and of full depth, with an uncertainty that rises with the row."""
    count = len(rows)
    spans = np.empty((count, 3), np.object_)
    for i, row in enumerate(rows):
        for j, one in enumerate(row):
            spans[i, j] = one
    before = np.empty(count, np.object_)
    before[:] = original or [NONE] * count
    unsure = np.ones((count, 3, 4)) * np.linspace(0.01, 0.9, count)[:, None, None]
    unsure[..., 2] = 5
    empty = np.full((count, 3, 1), np.nan, np.float32)
    return RecordedSpans(
        *([0, 1, 2], empty, empty, spans[:, -1]),
        original=before if original is not None else None,
        unsure=unsure,
        spans=spans,
        kind=Spans(SpanRule(("O",))),
    )


def test_the_kinds_of_disagreement_are_any_span_and_a_missed_span() -> None:
    r = recorded([[NONE, X, X], [X, NONE, NONE], [Y, X, X], [X, X, Y], [NONE, NONE, NONE]])
    (differs, all_), (missed, found) = r.failures()
    assert all_.tolist() == [0, 1, 2, 3, 4] and found.tolist() == [0, 2, 3]
    assert differs.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]
    # A further span is no missed one.
    assert missed.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert (r.differs == differs).all() and not r.differs[:, -1].any()
    # Against the original, full depth may miss a span, too.
    (differs, _), (missed, found) = recorded([[X, X, X], [NONE, X, Y]], [Y, NONE]).failures()
    assert differs.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert found.tolist() == [0] and missed.tolist() == [[1, 1, 1]]
    # Without a span at full depth, nothing can be missed.
    r = recorded([[X, NONE, NONE], [NONE, NONE, NONE]])
    assert r.failures()[1][0].shape == (0, 3)
    (row,) = calibration.trade_off(Samples.independent(r), RISK, [0.5], np.full((2, 3), 0.1))
    assert row.disagreement == 0.5


def test_a_guarantee_bounds_the_same_failures_text_by_text() -> None:
    differs, missed = criteria_of(Spans(SpanRule(("O",))))
    answers: list[Any] = [SimpleNamespace(answer=one) for one in (NONE, Y, Y - X, X)]
    assert differs.failures(answers) == [True, True, True, False]
    assert missed.failures(answers) == [True, False, True, False]  # a further span is no missed one
    assert missed.failures([*answers, SimpleNamespace(answer=NONE)]) is None  # nothing can be missed


RISK = Risk((None, None, None))


def samples_at(unlike: int, missed: int, found: int, count: int = 400) -> Samples:
    """`unlike` texts of which the first exit finds a span too much; in `missed` of `found` texts, it misses one."""
    rows = [[X, X, Y]] * missed + [[X, X, X]] * (found - missed) + [[X, NONE, NONE]] * unlike
    return Samples.independent(recorded(rows + [[NONE, NONE, NONE]] * (count - len(rows))))


@pytest.mark.parametrize(("unlike", "missed", "found"), [(0, 5, 20), (60, 1, 200)])
def test_the_bound_is_that_of_the_worse_kind(unlike: int, missed: int, found: int) -> None:
    samples = samples_at(unlike, missed, found)
    rows = calibration.trade_off(samples, RISK, [0.0, 0.5], np.full((400, 3), 0.1))
    rates = [((unlike + missed) / 400, 400), (missed / found, found)]
    assert rows[0].disagreement == rows[0].disagreement_bound == 0
    assert rows[1].disagreement == pytest.approx(max(rate for rate, _ in rates))
    bounds = [bound.upper_bound(round(rate * n), n) for rate, n in rates]
    assert rows[1].disagreement_bound == pytest.approx(max(bounds)) and max(bounds) > min(bounds)
    errors = [(rate, (rate * (1 - rate) / n) ** 0.5) for rate, n in rates]
    loss, error = max(errors, key=lambda one: one[0] + calibration.Z95_ONE_SIDED * one[1])
    assert rows[1].loss == pytest.approx(loss, abs=1e-9)
    assert rows[1].loss_interval[1] == pytest.approx(loss + calibration.Z95 * error, rel=0.02)


def test_the_default_tau_respects_both_kinds() -> None:
    """10 missed spans of 200 are 0.5% of the texts; 20 texts with spans are too few to show anything."""
    for unlike, missed, found, early in (
        (0, 0, 200, True),
        (0, 10, 200, False),
        (80, 0, 200, False),
        (0, 0, 20, False),
    ):
        samples = samples_at(unlike, missed, found, 2000)
        rows = calibration.trade_off(samples, RISK, [0.0, 0.5], np.full((2000, 3), 0.1))
        assert (calibration.within_loss(rows, 0.03).tau > 0) == early


# Import


def texts_file(folder: Path) -> Path:
    path = folder / "texts.txt"
    path.write_text("".join(f"{text}\n" for text, _ in make_rows(600, 12)))
    return path


@pytest.mark.slow
@pytest.mark.usefixtures("few_taus")
def test_an_import_has_exits_at_all_layers_and_bounds_both_rates(tmp_path: Path, kernels: Any) -> None:
    stock, texts = token_classifier("bert"), texts_file(tmp_path)
    command = f"import {stock} --texts {texts} --name tags --store {tmp_path}/store --work {tmp_path}/work"
    said = de3(f"{command} --max-loss 30")
    assert not (tmp_path / "work").exists()
    manifest = Store(tmp_path / "store").open("tags").manifest
    assert manifest.exit_layers == [0, 1, 2, 3] and manifest.aggregation == "simple"
    assert manifest.labels == list(TAGS) and manifest.input == "text" and manifest.source is None
    assert manifest.risk is not None and any(row.weights[-1] for row in manifest.risk)
    table = manifest.calibration
    assert table is not None and table.self_labelled and {row.signal for row in table.table} == {"risk"}
    assert all(row.disagreement <= row.disagreement_bound for row in table.table if row.tau > 0)
    assert "changes the spans of" in " ".join(said.split())
    with serving(tmp_path / "store", models=["tags"]) as server:
        rows = server.described(input=[text for text, _ in make_rows(30, 5)], tau=0.6)["data"]
        assert len({row["exit"]["layer"] for row in rows}) > 1
        certified = server.classify(input="a good film", max_disagreement=0.9)
        assert certified.status_code == 200 and certified.json()["certificate"]


def test_an_import_refuses_labels(tmp_path: Path) -> None:
    stock = token_classifier("bert")
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"{text},X\n" for text, _ in make_rows(600, 12)))
    said = refusal(f"import {stock} --texts {table} --label-column label --name t --store {tmp_path}/store")
    assert said.startswith("--label-column: ") and "is a token classifier" in said


# Heads that are refused


def with_labels(folder: Path, labels: list[str]) -> Path:
    """Give a small token classifier other labels, and a head of as many rows."""
    save_encoder(folder, tags=TAGS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(labels)), "label2id": {name: k for k, name in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config))
    weights, count = load_file(folder / "model.safetensors"), len(labels)
    weights |= {"classifier.weight": torch.randn(count, 64), "classifier.bias": torch.zeros(count)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_head_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    for labels, says in (
        ([f"B-{k}" for k in range(1001)], "must have 2 to 1000 labels, and it has 1001"),
        (["O"], "must have 2 to 1000 labels, and it has 1"),
        (["O", "B-X", "B-X"], "its labels must be distinct"),
        (["O", "B-\ud800"], "label"),
    ):
        folder = with_labels(tmp_path / str(len(labels)), labels)
        with pytest.raises(ValueError, match=says) as error:
            artifact_of(str(folder), "int8", tmp_path / "cache")
        assert str(error.value).isprintable() and len(str(error.value)) < 2000


def test_control_characters_in_a_label_break_no_answer_and_no_metric(tmp_path: Path) -> None:
    labels = ["B-\x00\n\u202e", 'I-"}']
    artifact = artifact_of(str(with_labels(tmp_path / "stock", labels)), "int8", tmp_path / "cache")
    with serving(artifact.path.parent.parent, threads=1) as server:
        row = server.described(input="a good film", redact=True)["data"][0]
        assert {span["label"] for span in row["spans"]} <= {label[2:] for label in labels} and row["spans"]
        assert all(f"[{span['label']}]" in row["text"] for span in row["spans"])
        metrics = httpx.get(f"{server.url}/metrics").text
        assert all(
            line[0] == "#" or line.rpartition(" ")[2][0].isdigit() for line in metrics.split("\n") if line
        )
