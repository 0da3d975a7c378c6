"""Only exits that save more time than they take are used, and the others are not computed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from de3.exits import placement, risk
from de3.exits.guarantee import profiles
from de3.exits.recorded import Recorded
from de3.exits.rule import ExitRule
from de3.exits.signals import FEATURES, UNUSED, Risk
from de3.export.calibrate import CalibrationPart, _placed, calibrate
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.store import Store
from tests.test_calibration import examples, recorded

COST = 0.1


def with_useless(r: Recorded) -> Recorded:
    """Another exit after the first, which answers the same."""
    order = [0, 0, 1, 2]
    return replace(r, exit_layers=[0, 1, 2, 3], logits=r.logits[:, order], distances=r.distances[:, order])


def time_of(r: Recorded, scores: np.ndarray, used: list[int], cost: float, limit: float) -> float:
    """The least time of a text within a limit, by the definition: layers, and each exit that it passes."""
    exits = [*used, len(r.exit_layers) - 1]
    differs, index = profiles(scores[:, exits], r.differs[:, exits], range(len(exits)), placement.TAUS)
    times = np.array(r.exit_layers)[np.array(exits)[index]] + cost * (index + 1)
    return float(times.mean(0)[differs.mean(0) <= limit].min())


@pytest.mark.parametrize("seed", range(3))
def test_exits_that_cost_more_than_they_save_are_left_out(seed: int) -> None:
    r = with_useless(recorded(3000, seed))
    scores = risk.cross_fit(r)
    unused = placement.unused_exits(r, scores, COST)
    assert 1 in unused or 0 in unused, "one of the two exits that answer the same"
    used = [j for j in range(3) if j not in unused]
    assert used
    whole, chosen = (
        sum(time_of(r, scores, each, COST, limit) for limit in placement.DISAGREEMENTS)
        for each in ([0, 1, 2], used)
    )
    assert chosen < whole
    for j in used:  # without any other one, it would take longer, up to what chance may save
        fewer = [i for i in used if i != j]
        times = (
            sum(time_of(r, scores, fewer, COST, limit) for limit in placement.DISAGREEMENTS)
            if fewer
            else np.inf
        )
        assert times >= (1 - placement.MIN_GAIN) * chosen


@pytest.mark.parametrize(("gain", "expected"), [(0.9, set()), (1.1, {0, 1})])
def test_an_exit_that_saves_no_more_than_chance_does_is_used(
    gain: float, expected: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = with_useless(recorded(3000))

    def time(layers: object, scores: object, differs: object, used: list[int], cost: float) -> float:
        return float((1 - gain * placement.MIN_GAIN) ** (3 - len(used)) + 0.1 * (2 not in used))

    monkeypatch.setattr(placement, "_time", time)
    assert placement.unused_exits(r, risk.cross_fit(r), COST) == expected


def test_an_exit_that_is_not_used_has_no_risk_below_any_tau() -> None:
    part = CalibrationPart.of(with_useless(recorded(3000)), examples(3000))
    placed, scores = _placed(part, COST, None)
    unused = sorted(placed.samples.recorded.unused)
    assert unused and (scores[:, unused] == 1).all() and (scores[:, :3] < 1).any()


def test_all_exits_are_used_where_the_cost_is_not_known_or_samples_are_few() -> None:
    r = with_useless(recorded(3000))
    scores = risk.cross_fit(r)
    assert placement.unused_exits(r, scores, 0.0) == frozenset()
    few = r.rows(np.arange(placement.MIN_SAMPLES - 1))
    assert placement.unused_exits(few, scores[: placement.MIN_SAMPLES - 1], COST) == frozenset()
    before = replace(r, unused=frozenset({0}))
    assert placement.unused_exits(before, scores, 0.0) == {0}
    assert 0 in placement.unused_exits(before, scores, COST)


def test_an_exit_costs_what_reading_its_weights_takes() -> None:
    two, many, wide = (
        placement.exit_cost(384, 1536, 2, 384, False),
        placement.exit_cost(384, 1536, 150, 384, False),
        placement.exit_cost(768, 3072, 77, 768, False),
    )
    assert (
        0.03 < two < 0.1 and 0.15 < many < 0.3 and 0.05 < wide < 0.17
    )  # as measured: lab/docs/experiments/time.md
    assert placement.exit_cost(384, 1536, 2, 0, False) < two / 5
    assert placement.exit_cost(384, 1536, 35, 0, True) == pytest.approx(0.06, abs=0.02)


@pytest.mark.usefixtures("few_taus")
def test_the_certificate_is_of_the_exits_that_are_used() -> None:
    parts = [CalibrationPart.of(with_useless(recorded(1500, seed)), examples(1500)) for seed in (1, 2)]
    found = calibrate(*parts, 0.02, "risk", exit_cost=COST)
    unused = [m for m, weights in enumerate(found.risk.weights) if weights == UNUSED]
    assert unused and len(unused) < 3
    for row in found.calibration.table:
        if row.signal == "risk" and row.tau < 1:
            assert all(row.histogram[m] == 0 for m in unused)
    assert not any(weights == UNUSED for weights in calibrate(*parts, 0.02, "risk").risk.weights)


@pytest.mark.usefixtures("few_taus")
def test_samples_that_certify_do_not_choose_exits() -> None:
    """With few samples, both parts certify."""
    parts = [CalibrationPart.of(with_useless(recorded(700, seed)), examples(700)) for seed in (1, 2)]
    found = calibrate(*parts, 0.02, "risk", exit_cost=COST)
    assert not any(weights == UNUSED for weights in found.risk.weights)


@pytest.fixture(scope="module", params=["native", "onnxruntime"])
def model(request: pytest.FixtureRequest, store: Path) -> Model:
    return Model(Store(store).open("tiny-int8"), request.param)


@pytest.mark.parametrize("ask_all", [False, True])
def test_an_exit_that_is_not_used_is_computed_only_if_it_is_asked_for(model: Model, ask_all: bool) -> None:
    last = model.manifest.num_layers
    unsure = (0.0,) * FEATURES  # a risk of 0.5
    rule = ExitRule(0.4, Risk((UNUSED, *[unsure] * (last - 1), None)))
    run = model.encoder.forward or model.encoder.layer_by_layer
    one = ForwardPass(model.tokenize("a good film"), [Decision(model.exits, rule, last, ask_all=ask_all)])
    run([one])
    (decision,) = one.decisions
    assert [r.layer for r in decision.readings] == list(range(0 if ask_all else 1, last + 1))
    assert decision.reason == "last_layer"
    if ask_all:
        assert decision.readings[0].score == 1.0
