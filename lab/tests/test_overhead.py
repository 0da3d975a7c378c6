"""The studies of the cost of an exit relative to its layer, and of the speed-up by the clock, on a tiny model."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from de3.data.examples import Example
from de3.exits.rule import exit_index
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.runtime.loading import load
from de3.server.settings import Settings
from lab.studies import overhead as study
from lab.studies.overhead import without_prototypes
from lab.studies.samples import recorded
from lab.studies.wall import wall
from lab.tests.commands import lab
from tests.fixtures import make_rows, write_rows

CORE = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def test_without_prototypes_all_else_is_as_before(store: Path) -> None:
    artifact = Store(store).open("tiny-int8")
    whole, stripped = Model(artifact, "onnxruntime"), without_prototypes(artifact, "onnxruntime")
    tokens = whole.tokenize("a good film , but not a great one")
    manifest = artifact.manifest
    for layer, (ours, theirs) in enumerate(
        zip(stripped.full_depth(tokens), whole.full_depth(tokens), strict=True)
    ):
        assert ours.distances is None
        assert (theirs.distances is not None) == (layer in manifest.prototype_layers)
        assert ours.logits is not None and theirs.logits is not None
        assert ours.hidden.tobytes() == theirs.hidden.tobytes()
        assert ours.logits.tobytes() == theirs.logits.tobytes()


def test_an_exit_costs_what_it_adds_to_its_own_copy() -> None:
    """The copy's own time and disturbances in some of its runs do not matter."""

    def copy(base: float, exits: float) -> study.Run:
        count = iter(range(10**9))
        return lambda asked: base + exits * asked + (1.0 if next(count) % 17 == 16 else 0.0)

    costs = study.costs_of([copy(0.010, 0.008), copy(0.013, 0.003)], 2, 0.05)
    assert costs["all"][0] == pytest.approx(0.010)
    assert costs["classifier"][0] == pytest.approx(0.0015)
    assert costs["prototypical"][0] == pytest.approx(0.004 - 0.0015)


def test_the_overhead_of_each_runtime(kernels: Any, store: Path, tmp_path: Path) -> None:
    numbers, plot = tmp_path / "numbers.json", tmp_path / "plot.png"
    common = (
        f"--tokens 8 --tokens 20 --tokens 100000 --seconds 0.5 --core {CORE} --json {numbers} --png {plot}"
    )
    lab(f"study overhead --store {store} --model tiny-int8 {common}")
    rows = json.loads(numbers.read_text())
    assert [(row["runtime"], row["tokens"]) for row in rows] == [
        (runtime, tokens) for runtime in ("native", "onnxruntime") for tokens in (8, 20)
    ]
    assert all(row["layer_us"] > 0 and row["precision"] == "int8" for row in rows)
    assert plot.stat().st_size > 5_000


def test_by_the_clock_texts_leave_where_the_rule_says(kernels: Any, store: Path, tmp_path: Path) -> None:
    rows = [row for row in make_rows(90, 41) if row[0].strip()]
    served = load(Store(store).open("tiny-int8"), Settings(runtime="native"))
    model, taus = served.model, (0.0, 0.1, 0.3, 0.6)
    texts = recorded(model, [write_rows(tmp_path / "texts.jsonl", rows)], ("text", "label")).recorded
    result = wall(served, [Example(text, int(label)) for text, label in rows], taus, 2)
    scores, every = model.manifest.default_signal.scores(texts), np.arange(len(rows))
    for tau, row in zip(taus, result["rows"], strict=True):
        index = exit_index(scores, tau)
        assert row["mean_exit_layer"] == pytest.approx(np.asarray(texts.exit_layers)[index].mean())
        assert row["accuracy"] == pytest.approx(texts.correct[every, index].mean())
        low, high = row["on_clock_range"]
        assert 0 < low <= row["on_clock"] <= high
        assert row["off"] == pytest.approx(row["predicted"] / row["on_clock"] - 1)
    full, deep = result["rows"][0], result["rows"][-1]
    assert full["on_clock"] == full["predicted"] == full["in_layers"] == 1
    assert deep["mean_exit_layer"] < full["mean_exit_layer"] and deep["predicted"] > 0
