"""The lean peers that `de3 loadtest compare` runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from de3.export.full_depth import export_full_depth
from de3.loadtest import compare, servers
from de3.loadtest.compare import Comparison
from de3.loadtest.servers import Server, lean_peers
from de3.loadtest.texts import Sample
from de3.model_store.store import Store
from tests.commands import de3, refusal
from tests.fixtures import make_rows, save_encoder, write_rows

SAMPLES = [Sample(text, label) for text, label in make_rows(30, 4)]
TEXTS = [text for text, _ in make_rows(20, 5)]


@pytest.fixture(scope="module")
def graph(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-int8 at full depth, as one graph."""
    folder = tmp_path_factory.mktemp("full-depth") / "graph"
    export_full_depth(Store(store).open("tiny-int8").path, folder, int8=True)
    return folder


def fused(graph: Path, name: str = "fused graph, FastAPI, int8") -> Server:
    """The lean peer that needs no environment of its own."""
    script = servers.PEERS / "fused_app.py"
    return Server(name, [sys.executable, str(script), str(graph), "--port", "{port}"])


def test_a_lean_peer_prints_its_measurement_in_one_line(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    command = fused(graph).measuring(tmp_path / "texts.json", 0.1)
    (line,) = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.splitlines()
    measured = json.loads(line)
    assert measured["texts_per_s"] > 0 and measured["passes"] >= 1
    assert np.shape(measured["logits"]) == (len(TEXTS), 2)


def test_ctranslate2_needs_a_stock_model(tmp_path: Path) -> None:
    paths = (tmp_path / "int8", tmp_path / "fp32", tmp_path / "out" / "calibration.json")
    assert {server.script for server in lean_peers(*paths, None)} == {"fused_app", "openvino_app"}
    (tmp_path / "bert").mkdir()
    folders = []
    for weights in (b"one model", b"another one"):  # two models with one name do not share a conversion
        (tmp_path / "bert" / "model.safetensors").write_bytes(weights)
        (converted,) = (s for s in lean_peers(*paths, tmp_path / "bert") if s.script == "ctranslate2_app")
        folders += [part for part in converted.command if "ctranslate2-bert-" in part]
    assert len(set(folders)) == 2
    assert converted.conversion[-1] == "--convert"


def test_a_peer_that_cannot_convert_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('runs no MPNet')"
    monkeypatch.setattr(servers, "peer_command", lambda script: [sys.executable, "-c", code])
    ours = Server("de3", [])
    other = Server("other", [], script="other_app", conversion=["--convert"])
    comparison = Comparison([ours, other], [Sample("a")], tmp_path, 1, 1, 1)
    comparison.results["notes"] = {}
    comparison._prepare()
    assert comparison.servers == [ours]
    assert comparison.results["notes"] == {"other": "left out: other cannot be prepared: runs no MPNet"}
    with pytest.raises(ValueError, match="no peer could be started"):
        comparison._best_peer()


def test_the_strongest_peer_gives_the_answers_of_full_depth(store: Path, graph: Path, tmp_path: Path) -> None:
    fields = ({"tau": 0.0}, {"tau": 0.9})
    full, early = (servers.ours(store, "tiny-int8", options=["--processes", "1"], **one) for one in fields)
    peer = fused(graph)
    comparison = Comparison([full, early, peer], SAMPLES, tmp_path, 0.1, 1, full_depth=full.name)
    comparison._saturation()
    rows, differ = comparison.results["saturation"], comparison.results["differ"]
    assert rows[peer.name][0]["memory_mb"] > 20
    assert all(row["wrong_labels"] == 0 for row, *_ in rows.values())
    assert differ[full.name] == differ[peer.name] == {"count": 0, "of": 30, "share": 0.0, "texts": []}
    texts = differ[early.name]["texts"]
    assert len(texts) == differ[early.name]["count"] == round(30 * differ[early.name]["share"]) > 0
    assert all(text["label"] != text["full_depth"] for text in texts)


@pytest.mark.slow
def test_a_classifier_without_exits_is_compared_at_full_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_encoder(tmp_path / "classifier", labels=2)
    texts = write_rows(tmp_path / "texts.jsonl", make_rows(30, 4))
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(servers, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(servers, "python_of", lambda _: Path(sys.executable))
    monkeypatch.setattr(compare, "CURVE", (0.5,))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as in a wheel without extras: no plots
    command = (
        f"loadtest compare --model {model} --store {tmp_path}/none --texts {texts} "
        f"--peer fused_app --seconds 0.5 --out {tmp_path}/out --rounds"
    )
    assert (
        refusal(f"{command} 1 --tau 0.1")
        == f"--tau: {model} has no exits; all its answers come from full depth"
    )
    monkeypatch.setattr("de3.loadtest.cli.QUICK_TEXTS", 20)
    output = de3(f"{command} 1")
    assert "3 servers in turn: about 20 s" in output and "latency" not in output
    assert "ONNX Runtime" not in output
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["differ"]["fused graph, FastAPI, int8"]["of"] == 15 and "curve" not in results
    output = de3(f"{command} 2")
    assert re.search(r"de3 \(full depth\) .* 0\.0% \(0 of 30\)", output) and "default τ" not in output
    assert f"{model} has no exits" in output and f"de3 import {model} --texts" in output
    assert not list((tmp_path / "out").glob("*.png"))
    differ = json.loads((tmp_path / "out/results.json").read_text())["differ"]
    assert differ["fused graph, FastAPI, int8"]["of"] == 30
