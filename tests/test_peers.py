"""The lean peers that `de3 loadtest compare` runs."""

import json
import re
import sys
from pathlib import Path

import pytest

from de3.loadtest import compare, servers
from de3.loadtest.compare import Comparison
from de3.loadtest.servers import Server, lean_peers
from de3.loadtest.texts import Sample
from tests.commands import de3, refusal
from tests.fixtures import make_rows, save_encoder

SAMPLES = [Sample(text, label) for text, label in make_rows(30, 4)]
TEXTS = [text for text, _ in make_rows(20, 5)]


def fused(graph: Path, name: str = "fused graph, FastAPI, int8") -> Server:
    """The lean peer that needs no environment of its own."""
    script = servers.PEERS / "fused_app.py"
    return Server(name, [sys.executable, str(script), str(graph), "--port", "{port}"])


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
    other = Server("other", [], script="other_app", conversion=["--convert"])
    comparison = Comparison([other], [Sample("a")], tmp_path, 1, 1, 1)
    with pytest.raises(ValueError, match="no peer could be started"):
        comparison.all(None)
    assert comparison.results["notes"] == {"other": "left out: other cannot be prepared: runs no MPNet"}


@pytest.mark.slow
def test_a_classifier_without_exits_is_compared_at_full_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_encoder(tmp_path / "classifier", labels=2)
    texts = tmp_path / "texts.csv"
    texts.write_text("text,intent\n" + "".join(f"{sample.text},LABEL_{sample.label}\n" for sample in SAMPLES))
    monkeypatch.setenv("DE3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(servers, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(servers, "python_of", lambda _: Path(sys.executable))
    monkeypatch.setattr(compare, "CURVE", (0.5,))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as in a wheel without extras: no plots
    command = (
        f"loadtest compare --model {model} --store {tmp_path}/none --texts {texts} "
        f"--peer fused_app --seconds 0.5 --out {tmp_path}/out --rounds 2 --label-column intent"
    )
    said = f"--tau: {model} has no exits; all its answers come from full depth"
    assert refusal(f"{command} --tau 0.1") == said
    output, peer = de3(command), "fused graph, FastAPI, int8"
    assert re.search(r"de3 \(full depth\) .* 0\.0% \(0 of 30\)", output) and "default τ" not in output
    assert f"{model} has no exits" in output and f"de3 import {model} --texts" in output
    assert not list((tmp_path / "out").glob("*.png"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["differ"][peer] == {"count": 0, "of": 30, "share": 0.0, "texts": []}
    rows = results["saturation"][peer]
    assert rows[0]["memory_mb"] > 20
    assert rows[0]["accuracy"] == rows[1]["accuracy"] is not None
