"""The studies of lab/docs/experiments.md: their measures on synthetic exits, and most of them on tiny models."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from lab.experiments import (
    cells,
    drift,
    joined,
    measures,
    scores,
    shift,
    signals,
    sweep,
)
from lab.experiments.cells import Cell, States
from tests.fixtures import make_rows


def made_up(n: int, seed: int, exits: int = 4, labels: int = 3) -> Recorded:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(n, exits, labels)).astype(np.float32)
    distances = generator.uniform(0, 2, logits.shape).astype(np.float32)
    return Recorded(list(range(exits)), logits, distances, generator.integers(labels, size=n))


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(1.0, 30.0))
def test_a_speedup_is_met_exactly_by_mixing_two_neighbouring_taus(seed: int, speedup: float) -> None:
    recorded = made_up(60, seed)
    depth = np.broadcast_to(np.array(recorded.exit_layers, float), (60, 4))
    depths: Any = SimpleNamespace(exit_layers=recorded.exit_layers, correct=depth)
    # Ties must not matter.
    scores = np.round(recorded.entropy, 1)
    assert measures.right_at(scores, depths, speedup).mean() == pytest.approx(3 / speedup)


def test_no_tau_up_to_the_chosen_one_loses_more() -> None:
    recorded = made_up(400, 3)
    found = measures.tau_within(recorded.entropy, recorded, 0.01)
    rows = np.arange(400)
    for tau in measures.thresholds(recorded.entropy):
        loss = (
            recorded.correct[:, -1].mean() - recorded.correct[rows, exit_index(recorded.entropy, tau)].mean()
        )
        if tau > found:
            assert loss > 0.01
            break
        assert loss <= 0.01 + 1e-9


def test_cap_is_large_where_the_classifier_cannot_see_the_state() -> None:
    classifier = torch.nn.Linear(3, 2)
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
        classifier.bias.zero_()
    model: Any = SimpleNamespace(classifiers=[classifier])
    pooled = np.array([[[1, 1, 0]], [[0, 0, 2]], [[3, 0, 4]]], np.float16)
    logits = (pooled @ np.array([[1, 0], [0, 1], [0, 0]])).astype(np.float32)
    recorded = Recorded([1], logits, np.full_like(logits, np.nan), np.zeros(3, int))
    found = scores.cap(model, States(pooled, recorded), 1.0, 0)[:, 0]
    assert found[0] == pytest.approx(1 / (2 * np.e + 1))
    assert found[1] == pytest.approx(np.e / (2 + np.e))
    assert found[2] == pytest.approx(np.exp(0.8) / (np.exp(3) + 1 + np.exp(0.8)), rel=1e-4)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("mrpc"),
        Cell("rte", fold=3),
        Cell("sst2", "mpnet", "TD", 2),
        Cell("mrpc", recipe="D,pooling=cls,gamma=0.1"),
    ],
)
def test_a_cell_is_known_by_its_name(cell: Cell) -> None:
    assert Cell.parse(cell.name) == cell


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("data")
    for task, header in (
        ("mrpc", "Quality\t#1 String\t#2 String\n"),
        ("rte", "sentence1\tsentence2\tlabel\n"),
    ):
        (folder / task).mkdir()
        for part, count, seed in (("train", 400, 1), ("dev", 120, 2)):
            pairs = zip(make_rows(count, seed), make_rows(count, seed + 10), strict=True)
            rows = ((a, b, label) for (a, label), (b, _) in pairs)
            lines = (
                f"{label}\t{a}\t{b}\n" if task == "mrpc" else f"{a}\t{b}\t{label}\n" for a, b, label in rows
            )
            (folder / f"{task}/{part}.tsv").write_text(header + "".join(lines))
    return folder


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small data sets in the formats of SST-2, the reviews, and CLINC150 with out-of-scope questions."""
    folder: Path = tmp_path_factory.mktemp("shifted")
    for name, count, seed in (("sst2/train", 500, 1), ("sst2/dev", 100, 2), ("ood/books", 90, 3)):
        rows = make_rows(count, seed)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.tsv").write_text(
            "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows if text.strip())
        )
    (folder / "ood/electronics.tsv").write_bytes((folder / "ood/books.tsv").read_bytes())
    parts = {part: make_rows(count, 4 + count) for part, count in (("train", 500), ("test", 100))}
    parts |= {f"oos_{part}": make_rows(40, 9) for part in ("train", "val", "test")}
    (folder / "clinc150").mkdir()
    (folder / "clinc150/data_full.json").write_text(json.dumps(parts))
    return folder


def all_of(root: Path) -> list[Any]:
    rows = cells.TASKS["rte"].train(root)
    return cells.data.to_examples(rows, cells.data.label_order(rows))


def test_folds_hold_out_every_sample_once(root: Path) -> None:
    parts = [cells._parts(Cell("rte", fold=k), root)[0] for k in range(5)]
    held = [example.text for part in parts for example in part.certify]
    assert sorted(map(str, held)) == sorted(str(e.text) for e in all_of(root))
    for part in parts:
        used = {example.text for example in part.train} | {example.text for example in part.tune}
        assert not used & {example.text for example in part.certify}


@pytest.fixture
def tiny(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; cells use a tiny encoder, and results go to the subfolder `results`."""
    monkeypatch.setattr(cells, "_encoder", lambda *_: str(encoder))
    monkeypatch.setattr(measures, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measures, "BOOTSTRAPS", 50)
    return tmp_path


def test_shift_and_drift_run_on_tiny_models(
    shifted: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shift, "STREAMS", 2)
    monkeypatch.setattr(shift, "TEXTS", 300)
    monkeypatch.setattr(drift, "ORDERS", 2)
    monkeypatch.setattr(drift, "AWAY", 1_000)
    monkeypatch.setattr(drift, "AUDITS", 30)
    names = ["sst2-minilm-D-0", "clinc150-minilm-D-0"]
    for study in (shift, drift):
        study.main(shifted, tiny / "runs", names)
        study.main(redraw=True)
    found = measures.load("shift")
    assert set(found["sst2"]["texts"]) == {"dev", "books", "electronics"}
    assert set(found["clinc150"]["texts"]) == {"test", "mixed", "out of scope"}
    assert found["clinc150"]["full depth"]["out of scope"] is None  # they have no label
    streams = measures.load("drift")
    assert set(streams) == {"books", "electronics", "mixed"}
    assert all(len(runs) == 2 for arms in streams.values() for runs in arms.values())
    assert all((tiny / f"results/{name}.png").stat().st_size > 5_000 for name in ("shift", "drift"))


def test_all_studies_run_on_tiny_models(root: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tiny / "runs"
    folds = [f"rte-minilm-D-0-fold{k}" for k in (0, 3)]
    cells.main(root, runs, ["mrpc-mpnet-D-0"])  # a teacher
    signals.main(root, runs, ["mrpc-minilm-D-0", "mrpc-minilm-D-1", *folds])
    rows = measures.load("signals")
    in_folds = sum(len(cells._parts(Cell.parse(name), root)[0].certify) for name in folds)
    assert [(row["task"], row["embeddings"], row["n"]) for row in rows] == [
        ("mrpc", True, 120),
        ("mrpc", False, 120),
        ("rte", True, in_folds),
        ("rte", False, in_folds),
    ]
    assert set(rows[0]["signals"]) >= {"entropy", "CAP", "learned exits", "EDR", "risk", "patience"}
    sweep.main(root, runs, ["mrpc-minilm-D-0", *folds])
    assert (tiny / "results/sweep.png").stat().st_size > 5_000
    sweep.main(root, runs, ["mrpc-minilm-none-0", folds[0]], add=True)
    rows = measures.load("sweep")
    assert [(row["task"], row["recipe"], row["cells"]) for row in rows[::2]] == [
        ("mrpc", "D", 1),
        ("rte", "D", 1),
        ("mrpc", "none", 1),
    ]
    for study in (signals, sweep):
        study.main(redraw=True)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers())
def test_joined_questions_are_each_in_one_text_with_their_intents(intents: list[str], seed: int) -> None:
    questions = [(f"question {i:03}", intent) for i, intent in enumerate(intents)]
    rows = joined.join(questions, random.Random(seed))
    of = dict(questions)
    found = []
    for text, labels in rows:
        parts = [f"question {number}" for number in text.replace("question", "").split()]
        assert labels == sorted({of[part] for part in parts}) and len(labels) == len(parts) <= 2
        found += parts
    assert sorted(found) == sorted(of)
    pairs = sum(len(labels) == 2 for _, labels in rows)
    most = max(Counter(intents).values())
    assert pairs <= len(questions) * 3 / 8 and (pairs > 0 or len(questions) < 3 or most > len(questions) / 2)
