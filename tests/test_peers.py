"""The lean peers that `de3 loadtest compare` runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from de3.export.full_depth import export_full_depth
from de3.loadtest import servers
from de3.loadtest.client import Target, ask_alone
from de3.loadtest.compare import Comparison
from de3.loadtest.servers import Server, lean_peers
from de3.loadtest.texts import Sample
from de3.model_store.store import Store
from tests.fixtures import make_rows
from tests.serving import free_port, serving

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
    with servers.running(fused(graph), free_port(), tmp_path / "log") as peer:
        theirs = ask_alone(peer.target, SAMPLES)
        assert peer.memory_mb() > 20
    with serving(store, models=["tiny-int8"]) as server:
        ours = ask_alone(Target(server.url, body=lambda text: {"input": text, "tau": 0}), SAMPLES)
    assert theirs == ours
