"""A request's choice of signal, with and without risk; test_budgets.py asks over HTTP."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from de3.exits.trade_offs import TradeOffs
from de3.model_store.manifest import Manifest
from de3.model_store.store import Store
from de3.runtime.errors import RequestError
from de3.runtime.options import ExitOptions, OptionFields
from de3.runtime.rules import Rules
from de3.server.settings import Settings
from tests.test_hostile_models import edit


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    return Store(store).open("tiny").manifest


def options(**fields: Any) -> ExitOptions:
    """The options of a request with these fields."""
    return OptionFields.model_validate(fields).options


def test_tau_is_the_one_of_the_chosen_signals_calibration(manifest: Manifest) -> None:
    """Without τ or a target, another signal is about as cautious as the default."""
    calibration, rules = manifest.calibration, Rules(manifest, Settings())
    assert calibration is not None
    for signal, lam in dict.fromkeys((row.signal, row.lam) for row in calibration.table):
        trade_offs = TradeOffs(manifest.trade_offs()[signal, lam])
        default = trade_offs.at_disagreement(calibration.default.disagreement)
        if (signal, lam) == (manifest.defaults.signal, manifest.defaults.lam):
            default = calibration.default
        wishes: list[tuple[dict[str, Any], Any, tuple[str, float | None]]] = [
            ({}, default, ("default", None)),
            ({"max_layer": 1}, default, ("default", None)),
            ({"target_speedup": 2.0}, trade_offs.at_speedup(2.0), ("target_speedup", 2.0)),
            ({"max_disagreement": 0.1}, trade_offs.within_disagreement(0.1), ("max_disagreement", 0.1)),
        ]
        for wish, row, set_by in wishes:
            found = rules.choose(options(signal=signal, **wish))  # edr without λ is the calibrated one
            rule = found.rule
            assert (rule.tau, rule.signal.name, rule.signal.lam) == (row.tau, signal, lam)
            assert (found.set_by, found.requested, rule.max_layer) == (*set_by, wish.get("max_layer"))
            # The effect of max_layer is not in the calibration.
            assert found.expected == (None if "max_layer" in wish else row)
        assert found.certificate is not None and found.certificate["bound"] == row.disagreement_bound


@pytest.mark.parametrize("wish", [{}, {"max_layer": 2}, {"target_speedup": 2}, {"max_disagreement": 0.1}])
def test_a_signal_without_a_calibration_needs_tau(manifest: Manifest, wish: dict[str, float]) -> None:
    rules = Rules(manifest, Settings())
    with pytest.raises(RequestError, match=r"give tau, or a signal that has one: entropy, .*risk") as error:
        rules.choose(options(**{"lambda": 77}, **wish))
    assert error.value.field == next(iter(wish.keys() - {"max_layer"}), "tau")
    assert rules.choose(options(**{"lambda": 77}, tau=0.1)).rule.signal.lam == 77


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signal": "margin"}, "signal"),
        ({"signal": "risk", "lambda": 0}, "lambda: is only valid with the signal edr"),
        ({"signal": "edr", "lambda": 101}, "lambda"),
    ],
)
def test_a_refused_signal_is_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**fields)


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
