"""The comparison of engines in process, and classifiers with random weights."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from de3.export.full_depth import export_full_depth
from de3.loadtest.servers import Server
from de3.model_store.store import Store
from lab.engines import Engines, compared, name_of, read_bandwidth, tables
from lab.studies.untrained import NAME, untrained
from tests.fixtures import make_rows, save_tokenizer
from tests.test_peers import fused

TEXTS = [text for text, _ in make_rows(20, 5)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small classifier of random weights, as `untrained` writes it."""
    folder = tmp_path_factory.mktemp("untrained")
    save_tokenizer(folder / "tokenizer")
    untrained(folder, 2, 64, 4, 128, str(folder / "tokenizer"))
    return folder


def test_engines_take_turns_and_broken_ones_are_left_out(
    kernels: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.engines.read_bandwidth", lambda: read_bandwidth(2**20))
    artifact = Store(small / "store").open(NAME)
    export_full_depth(artifact.path, tmp_path / "graph", int8=True)
    broken = Server("broken, int8", [sys.executable, "-c", "raise SystemExit('no such engine')"])
    silent = Server("silent, int8", [sys.executable, "-c", "pass"])
    lines: list[str] = []
    core = min(os.sched_getaffinity(0))
    peers = [broken, fused(tmp_path / "graph"), silent]
    results = Engines(artifact, peers, TEXTS, tmp_path, 0.05, 2, core, lines.append).run()
    assert set(results["rounds"]) == {name_of(1), name_of(4), name_of(16), "ONNX Runtime, int8"}
    assert all(len(rates) == 2 and min(rates) > 0 for rates in results["rounds"].values())
    assert results["notes"]["broken, int8"] == "left out: broken, int8: no such engine"
    assert "does not measure itself" in results["notes"]["silent, int8"]
    assert results["logits_difference"]["ONNX Runtime, int8"] < 0.05
    assert results["compared"]["best_int8"] == "ONNX Runtime, int8"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert len(tables(results)[0].rows) == 4


def test_shares_and_ratios_are_of_the_same_round() -> None:
    rounds = {name_of(1): [100.0, 50.0], "ONNX Runtime, int8": [50.0, 25.0], "OpenVINO, int8": [80.0, 25.0]}
    rounds |= {"OpenVINO, bf16": [500.0, 500.0], "CTranslate2, int8": [400.0, 400.0]}
    results = {
        "rounds": rounds,
        "ours": [name_of(1)],
        "texts": 10,
        "calls": {name_of(1): 10},
        "multiply_adds": 1e6,
        "weights": 1e6,
        "peak_multiply_adds_per_s": [2e8, 1e8],  # in a slower round, all are slower
        "read_bytes_per_s": [1e9, 5e8],
    }
    ours = compared(results)["engines"][name_of(1)]
    assert compared(results)["best_int8"] == "OpenVINO, int8"  # not bf16, and not CTranslate2
    assert ours["of_peak"] == "0.50 (0.50 … 0.50)" and ours["of_bandwidth"] == "0.10 (0.10 … 0.10)"
    assert ours["against"]["ONNX Runtime, int8"] == "2.00 (2.00 … 2.00)"
    assert ours["against"]["OpenVINO, int8"] == "1.62 (1.25 … 2.00)"
