"""A request's choice of signal over HTTP, with and without risk, with the kernels and layer by layer."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from de3.exits.trade_offs import TradeOffs
from de3.model_store.manifest import Manifest
from de3.model_store.store import Store
from de3.server.errors import RequestError
from de3.server.options import ExitOptions
from de3.server.rules import Rules
from de3.server.settings import Settings
from tests.serving import Server
from tests.test_hostile_models import edit


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    return Store(store).open("tiny").manifest


def asked(server: Server, **fields: Any) -> dict[str, Any]:
    """The answer's `tau_choice` for a text, together with its `exit`."""
    answer = server.classify(input="not bad but a very dull film", explain=True, **fields)
    assert answer.status_code == 200, answer.text
    return {**answer.json()["tau_choice"], "exit": answer.json()["data"][0]["exit"]}


def test_tau_is_the_one_of_the_chosen_signals_calibration(server: Server, manifest: Manifest) -> None:
    """Without τ or a target, another signal is about as cautious as the default."""
    calibration = manifest.calibration
    assert calibration is not None
    for signal, lam in dict.fromkeys((row.signal, row.lam) for row in calibration.table):
        fields: dict[str, Any] = {"signal": signal}  # edr without λ is the calibrated one
        trade_offs = TradeOffs(manifest.trade_offs()[signal, lam])
        default = trade_offs.at_disagreement(calibration.default.disagreement)
        if (signal, lam) == (manifest.defaults.signal, manifest.defaults.lam):
            default = calibration.default
        for wish, row in (
            ({}, default),
            ({"max_layer": 1}, default),
            ({"target_speedup": 2.0}, trade_offs.at_speedup(2.0)),
            ({"max_disagreement": 0.1}, trade_offs.within_disagreement(0.1)),
        ):
            found = asked(server, **wish, **fields)
            assert (found["tau"], found["signal"], found["lambda"]) == (row.tau, signal, lam)
            if "max_layer" in wish:  # its effect is not in the calibration
                assert found["exit"]["layer"] <= 1 and "expected" not in found
            else:
                assert found["expected"]["disagreement_bound"] == row.disagreement_bound
            if row is default:
                assert found["set_by"] == "default"
            else:
                assert (found["set_by"], found["requested"]) == (*wish, *wish.values())
        answer = server.classify(input="a film", max_disagreement=0.1, **fields).json()
        assert answer["certificate"]["bound"] == row.disagreement_bound


UNKNOWN = {"lambda": 77}  # the calibration has no such signal


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (UNKNOWN, "tau"),
        ({**UNKNOWN, "max_layer": 2}, "tau"),
        ({**UNKNOWN, "target_speedup": 2}, "target_speedup"),
        ({**UNKNOWN, "max_disagreement": 0.1}, "max_disagreement"),
        ({"signal": "margin"}, "signal"),
        ({"signal": "risk", "lambda": 0}, "lambda"),
        ({"signal": "edr", "lambda": 101}, "lambda"),
    ],
)
def test_a_refused_signal_is_explained(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = server.classify(input="a film", **fields)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["param"] == param
    if fields is UNKNOWN:
        assert "risk" in error["message"] and "entropy" in error["message"]
        assert server.classify(input="a film", tau=0.1, **fields).status_code == 200


def table_default(manifest: dict[str, Any], signal: str) -> dict[str, Any]:
    """Defaults for a signal, from the middle one of its calibration rows."""
    rows = [r for r in manifest["calibration"]["table"] if r["signal"] == signal]
    return {key: rows[len(rows) // 2][key] for key in ("tau", "signal", "lambda")}


def without_risk(manifest: dict[str, Any], signal: str) -> None:
    """Remove the weights and rows of risk from a calibrated manifest, and make another signal the default."""
    calibration = manifest["calibration"]
    manifest["defaults"] = table_default(manifest, signal)
    chosen = manifest["defaults"]["tau"], signal
    calibration["default"] = next(r for r in calibration["table"] if (r["tau"], r["signal"]) == chosen)
    calibration["table"] = [r for r in calibration["table"] if r["signal"] != "risk"]
    del manifest["risk"]


def test_without_risk_another_signal_is_served(store: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(store, tmp_path / "store")
    edit(mine / "tiny" / "1", lambda m: without_risk(m, "edr"))
    manifest = Store(mine).open("tiny").manifest
    rules = Rules(manifest, Settings())
    rule = rules.choose(ExitOptions()).rule
    assert (rule.tau, rule.signal) == (manifest.defaults.tau, manifest.default_signal)
    assert rule.signal.name == "edr"
    with pytest.raises(RequestError, match="has no risk") as error:
        rules.choose(ExitOptions(signal="risk", tau=0.1))
    assert error.value.field == "signal"
