"""The studies of lab/docs/experiments.md: their measures on synthetic exits, and most of them on tiny models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.data.examples import label_order, to_examples
from de3.exits.recorded import Recorded
from lab.experiments import cells, drift, measures, shift, signals, sweep
from lab.experiments.cells import Cell
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
    return to_examples(rows, label_order(rows))


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
    assert [(row["task"], row["cells"]) for row in measures.load("sweep")[::2]] == [("mrpc", 1), ("rte", 2)]
    for study in (signals, sweep):
        study.main(redraw=True)
