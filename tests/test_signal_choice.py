"""A request's choice of signal over HTTP, with and without risk, with the kernels and layer by layer."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from de3.exits.reading import Reading, read
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule
from de3.exits.signals import SIGNALS, ModelTraits, Signal
from de3.exits.trade_offs import TradeOffs
from de3.model_store.manifest import Manifest
from de3.model_store.model import Model
from de3.model_store.store import Store
from de3.server.answer import significant
from de3.server.errors import RequestError
from de3.server.options import ExitOptions
from de3.server.rules import Rules
from de3.server.settings import Settings
from tests.fixtures import make_rows
from tests.serving import Server, serving
from tests.test_hostile_models import edit

TEXTS = [text for text, _ in make_rows(60, 41)]


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    return Store(store).open("tiny").manifest


def by_the_rule(model: Model, text: str, tau: float, signal: Signal) -> tuple[int, float | None]:
    """The layer at which a text exits, and its score there; None if the exit has none."""
    rule, passed = ExitRule(tau, signal), list[Reading]()
    for layer, step in enumerate(model.full_depth(model.tokenize(text))):
        if step.logits is None:
            continue
        distances = None if step.distances is None else step.distances.tolist()
        passed.append(read(layer, step.logits.tolist(), distances))
        score = signal.score(passed)
        if rule.exits(score):
            break
    return layer, score


def asked(server: Server, **fields: Any) -> dict[str, Any]:
    """The answer's `tau_choice` for a text, together with its `exit`."""
    answer = server.classify(input=TEXTS[0], explain=True, **fields)
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
        ({"signal": 1}, "signal"),
        ({"signal": "risk", "lambda": 1}, "lambda"),
        ({"signal": "risk", "lambda": 0}, "lambda"),
        ({"signal": "entropy", "lambda": 1}, "lambda"),
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


@dataclass(frozen=True)
class Mean:
    """A new signal, written as `exits/signals.py` says: the mean entropy of the exits passed; no kernel computes it."""

    name: ClassVar[str] = "mean"
    code: ClassVar[int | None] = None
    lam: ClassVar[float | None] = None
    table: ClassVar[bytes | None] = None

    @classmethod
    def of(cls, model: ModelTraits, lam: float | None) -> "Mean":
        model.check_has_classes(cls.name, exclusive=False)
        return cls()

    def score(self, readings: Sequence[Reading]) -> float:
        return sum(r.entropy for r in readings) / len(readings)

    def scores(self, recorded: Recorded) -> np.ndarray:
        return recorded.entropy.cumsum(1) / np.arange(1, len(recorded.exit_layers) + 1)


@pytest.mark.usefixtures("kernels")
def test_a_new_signal_is_served_once_it_is_listed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNALS, "mean", Mean)
    with serving(store, models=["tiny-int8"], threads=2) as server:
        (served,) = server.service.models.all
        assert served.model.encoder.forward is not None  # the kernels run the other signals
        left = set()
        for tau in (0.05, 0.3, 0.6):
            fields = {"input": TEXTS, "tau": tau, "signal": "mean"}
            rows = server.classify(**fields).json()["data"]
            for text, row in zip(TEXTS, rows, strict=True):
                layer, score = by_the_rule(served.model, text, tau, Mean())
                found = row["exit"]
                assert (found["signal"], found["layer"], found["score"]) == (
                    "mean",
                    layer,
                    significant(score),
                )
                left.add(layer)
        assert len(left) > 1
        (row,) = httpx.get(server.url + "/v1/models").json()["data"]
        assert row["signals"] == [*SIGNALS]
        names = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
        assert names["Exit"]["properties"]["signal"]["enum"] == row["signals"]


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


@pytest.mark.parametrize("signal", ["edr", "entropy"])
def test_without_risk_the_other_signals_are_served(store: Path, tmp_path: Path, signal: str) -> None:
    mine = shutil.copytree(store, tmp_path / "store")
    edit(mine / "tiny" / "1", lambda m: without_risk(m, signal))
    manifest = Store(mine).open("tiny").manifest
    rules = Rules(manifest, Settings())
    rule = rules.choose(ExitOptions()).rule
    assert (rule.tau, rule.signal) == (manifest.defaults.tau, manifest.default_signal)
    assert rule.signal.name == signal
    with pytest.raises(RequestError, match="has no risk") as error:
        rules.choose(ExitOptions(signal="risk", tau=0.1))
    assert error.value.field == "signal"
