"""The τ that a promise allows: profiles, the fixed order of the tests, the fall after a change, and restarts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.exits import betting
from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import CONFIDENCE
from de3.exits.promise import (
    MAX_SHARES,
    PATIENCE,
    Evidence,
    Profile,
    Promise,
    RecentRates,
    SavedPromise,
    profile,
)
from de3.exits.rule import ExitRule, exit_index
from de3.exits.signals import Entropy

TAUS = np.array(FINE_TAUS)
GRID = np.array([0.0, 0.1, 0.2, 0.4])
CLEAN = Profile(np.zeros(4, np.bool_), np.array([3, 2, 1, 0]))


def unlike_from(index: int) -> Profile:
    """The profile of a text whose answer differs at every τ of GRID from this index on."""
    return Profile(np.arange(4) >= index, np.array([3, 2, 1, 0]))


def step(promise: Promise, share: float, audit: Profile, is_repeat: bool = False) -> bool:
    """Count an audit, and let τ rise if the evidence allows it; returns True if τ changed."""
    before = promise.index
    promise.add(share, audit, is_repeat)
    promise.advance()
    return promise.index != before


def until_lower(recent: RecentRates) -> int:
    """Count audits that differ from τ = 0.2 on until they lower τ; returns their number."""
    for count in range(1000):
        if recent.allows(3) < 3:
            return count
        recent.add(0.05, unlike_from(2).differs)
    raise AssertionError("τ is never lowered")


# Some scores equal a τ of the grid: at that τ, a text must not exit.
scores = st.lists(
    st.one_of(st.none(), st.just(float("nan")), st.floats(0, 1), st.sampled_from(FINE_TAUS)),
    min_size=1,
    max_size=7,
)


@given(scores, st.data())
def test_a_profile_is_what_the_rule_does(values: list[float | None], data: st.DataObject) -> None:
    differs = [*data.draw(st.lists(st.booleans(), min_size=len(values) - 1, max_size=len(values) - 1)), False]
    layers = list(range(len(values)))
    audit = profile(values, differs, layers, TAUS)
    row = np.array([[np.nan if v is None else v for v in values]])
    for k, tau in enumerate(FINE_TAUS):
        rule = ExitRule(tau, Entropy())
        index = next((i for i, v in enumerate(values[:-1]) if rule.exits(v)), len(values) - 1)
        assert index == exit_index(row.copy(), tau)[0]
        assert (audit.differs[k], audit.layers[k]) == (differs[index], layers[index])


def test_tau_rises_in_the_fixed_order_up_to_the_first_that_is_not_proved() -> None:
    promise = Promise(0.1, GRID)
    assert (promise.tau, promise.reason) == (0.0, "start")
    # At τ = 0.2 every fifth text differs, at τ = 0.4 none does. Even so, τ must stay at 0.1.
    odd = Profile(np.array([False, False, True, False]), CLEAN.layers)
    for n in range(1000):
        step(promise, 1.0, odd if n % 5 == 0 else CLEAN)
    assert (promise.tau, promise.reason) == (0.1, "evidence")
    assert promise.evidence.e_values(0.1)[3] > 20


def test_tau_does_not_rise_before_the_evidence_suffices() -> None:
    promise = Promise(0.1, GRID)
    changes = [n for n in range(200) if step(promise, 1.0, CLEAN)]
    first = next(
        n for n in range(200) if np.mean([(1 + 0.1 * c) ** (n + 1) for c in (0.25, 0.5, 0.75)]) >= 20
    )
    assert changes == [first]
    assert promise.tau == 0.4  # in one step, because all texts agree


def test_each_audit_is_weighted_by_the_inverse_of_its_share() -> None:
    evidence = Evidence(GRID)
    for share, differ in ((1.0, 1), (0.1, 3)):
        for n in range(10):
            evidence.add(share, unlike_from(1 if n < differ else 4), served_differs=n < differ)
    assert evidence.rates()[1] == pytest.approx((1 + 30) / (10 + 100))
    assert evidence.served() == evidence.rates()[1]
    assert evidence.mean_layers()[2] == pytest.approx(1)


def test_a_rise_above_the_promise_discards_the_evidence() -> None:
    promise, rng = Promise(0.1, GRID), np.random.default_rng(3)
    for _ in range(100):
        step(promise, 1.0, CLEAN)
    assert promise.tau == 0.4
    for _ in range(500):
        step(promise, 1.0, unlike_from(3 if rng.random() < 0.05 else 4))
    assert (promise.tau, promise.reason) == (0.4, "evidence")
    reasons = []
    while promise.reason != "change":
        step(promise, 1.0, unlike_from(3 if rng.random() < 0.15 else 4))
        reasons.append(promise.reason)
        assert len(reasons) < 3000
    assert set(reasons) == {"evidence", "recent", "change"}  # τ falls before the change is certain
    assert promise.tau == 0.0
    assert (promise.evidence.audits, promise.evidence.texts, promise.recent.weight) == (0, 0, 0)
    assert not any(promise.saved().detector)


def test_a_calibrated_start_is_not_tested_and_falls_like_any_other() -> None:
    promise = Promise(0.1, GRID, start=2)
    assert (promise.tau, promise.reason) == (0.2, "calibrated")
    for _ in range(100):
        step(promise, 0.1, unlike_from(2))
    assert (promise.tau, promise.reason) == (0.0, "change")


def test_a_promise_continues_where_another_left_off() -> None:
    first, second = Promise(0.1, GRID), Promise(0.1, GRID)
    for n in range(150):
        step(first, 1.0, unlike_from(3 if n % 3 == 0 else 4))
    second.restore(first.evidence, first.saved())
    assert (second.tau, second.reason) == (first.tau, first.reason) == (0.2, "evidence")
    for promise in (first, second):
        step(promise, 0.1, unlike_from(2))
    assert first.saved() == second.saved()
    # Only the evidence is used if the proof was for another rate, or had a larger error probability.
    for other in (Promise(0.01, GRID), Promise(0.1, GRID, error=1e-9)):
        other.restore(first.evidence, first.saved())
        assert other.tau == 0 and other.evidence is first.evidence


@pytest.mark.parametrize(
    "change",
    [
        {"tau": 0.3},
        {"detector": [0.0]},
        {"detector": [-1.0, 0, 0]},
        {"recent": [0.0]},
        {"recent": [0, 0, 0, 3.0]},
        {"recent": [0, 0, 0, -1.0]},
    ],
)
def test_a_saved_promise_that_does_not_fit_is_not_restored(change: dict[str, Any]) -> None:
    promise = Promise(0.1, GRID)
    kept = SavedPromise(0.1, 0.1, 0.0, "evidence", [0.0] * 3, 2.0, [0.0] * 4)
    with pytest.raises(ValueError, match="does not match the τ grid"):
        promise.restore(Evidence(GRID), kept._replace(**change))
    assert promise.tau == 0
    promise.restore(Evidence(GRID), kept)
    assert promise.tau == 0.1


def test_a_repeat_counts_only_against_a_higher_tau() -> None:
    evidence, other = Evidence(GRID), Evidence(GRID)
    for n in range(30):
        for one in (evidence, other):
            one.add(1.0, unlike_from(3 if n % 10 == 0 else 4))
    before = evidence.e_values(0.1)
    evidence.add_repeat(1.0, CLEAN.differs)
    assert evidence.e_values(0.1).tolist() == before.tolist()
    evidence.add_repeat(1.0, unlike_from(2).differs)
    other.add(1.0, unlike_from(2))
    after = evidence.e_values(0.1)
    assert after.tolist() == [*before[:2], *other.e_values(0.1)[2:]]
    assert (after[2:] < before[2:]).all()
    assert [evidence.e_value(0.1, k) for k in range(4)] == pytest.approx(after.tolist())


def test_repeated_texts_are_not_a_change() -> None:
    promise, rng = Promise(0.1, GRID), np.random.default_rng(5)
    texts = [unlike_from(3) if n % 30 == 0 else CLEAN for n in range(300)]
    for audit in texts:
        step(promise, 1.0, audit)
    assert promise.tau == 0.4
    for _ in range(5000):
        promise.skip(0.2, 4, repeats=4)
        step(promise, 0.2, texts[rng.integers(300)], is_repeat=True)
    assert (promise.tau, promise.reason) == (0.4, "evidence")


def test_recent_audits_lower_tau_at_once_and_it_rises_again_only_when_told_to() -> None:
    """The disagreement rises too little for the change detector, so the proof stays valid."""
    promise = Promise(0.1, GRID)
    for _ in range(600):
        promise.add(1.0, CLEAN)
    assert promise.tau == 0
    assert promise.recent.weight < 300  # at τ = 0, as few audits as possible count as recent
    promise.advance()
    assert promise.tau == 0.4
    for n in range(3000):
        promise.add(1.0, unlike_from((3, 4)[n % 9 > 0]))  # 11%
    assert (promise.tau, promise.reason, promise.proved) == (0.2, "recent", 3)
    for n in range(1200):
        promise.add(1.0, unlike_from((3, 4)[n % 20 > 0]))  # 5%
    assert (promise.tau, promise.reason) == (0.2, "recent")
    promise.advance()
    assert (promise.tau, promise.reason) == (0.4, "evidence")


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_and_a_promised_rate_are_probabilities_above_0(value: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Evidence(GRID).add(value, CLEAN)
    with pytest.raises(ValueError, match="promise"):
        Promise(value, GRID)


def test_bounds_are_around_the_rate_whatever_the_weights() -> None:
    evidence = Evidence(GRID)
    for n in range(300):
        for share, is_unlike in ((1.0, False), (0.05, n < 30)):
            evidence.skip(share, round(1 / share) - 1)
            evidence.add(share, unlike_from(1 if is_unlike else 4))
    lower, upper = evidence.bounds()
    rates = evidence.rates()
    assert (lower <= rates).all() and (rates <= upper).all()
    # By its weights alone, the bound would be below the rate.
    bounds = betting.bounds(*evidence._counts(slice(1, 2)), CONFIDENCE)
    assert bounds[1][0] < rates[1] == upper[1]


def test_a_calibrated_start_is_not_a_proof_for_a_strict_one() -> None:
    calibrated, strict, again = Promise(0.1, GRID, start=2), Promise(0.1, GRID), Promise(0.1, GRID, start=3)
    step(calibrated, 1.0, CLEAN)
    strict.restore(calibrated.evidence, calibrated.saved())
    assert (strict.tau, strict.reason) == (0.0, "start")
    again.restore(calibrated.evidence, calibrated.saved())
    assert (again.tau, again.reason) == (0.2, "calibrated")  # it keeps its earlier start
    assert again.saved() == calibrated.saved()
    calibrated.reset("reset")
    strict.restore(calibrated.evidence, calibrated.saved())
    assert (strict.tau, strict.reason) == (0.0, "reset")


def test_more_audits_are_recent_while_more_texts_are_audited_or_the_promise_is_small() -> None:
    weights = []
    for share in (0.01, 0.05, 0.25, 0.5, 1.0):
        recent = RecentRates(0.02, 4)
        for _ in range(10_000):
            recent.add(share, CLEAN.differs)
        weights.append(round(recent.weight))
        # Only with many audits is the standard error so small that 1.5% is more than one standard error below 2%.
        recent.differing = np.full(4, 0.015 * recent.weight)
        assert recent.allows(3) == (3 if share > 0.5 else 0)
    assert weights == [300, 300, 300, 600, 1200]
    recent = RecentRates(0.01, 4)
    for _ in range(10_000):
        recent.add(0.05, CLEAN.differs)
    assert round(recent.weight) == 600  # which have 6 disagreements at the promised rate


def test_recent_rates_follow_at_once_when_fewer_texts_are_audited() -> None:
    counts = []
    for share in (0.05, 1.0):
        recent = RecentRates(0.02, 4)
        for _ in range(4000):
            recent.add(share, CLEAN.differs)
        counts.append(until_lower(recent))
    assert counts[0] == counts[1] < 10


def test_few_recent_audits_do_not_lower_tau() -> None:
    recent = RecentRates(0.1, 4)
    until_lower(recent)
    assert 100 <= recent.weight < 101  # a third of the window's 300
    assert recent.allows(3) == 1
    recent.weight, recent.differing = 150.0, np.full(4, 0.08 * 150)
    assert recent.allows(3) == 3  # the standard error is that of a full window


def test_the_change_detector_counts_texts_that_were_not_drawn() -> None:
    promise, detector = Promise(0.1, GRID, start=2), betting.ChangeDetector(0.1, PATIENCE)
    for differs in (True, False, True):
        promise.skip(0.05, 19)
        step(promise, 0.05, unlike_from(2 if differs else 4))
        detector.skip(0.05, 19)
        detector.add(0.05, differs)
    assert promise.saved().detector == detector.wealth.tolist()


def test_counted_shares_are_limited() -> None:
    evidence = Evidence(GRID)
    for number in range(MAX_SHARES):
        evidence.skip((1 + number) / MAX_SHARES, 1)
    evidence.skip(1 / MAX_SHARES, 1)  # not a new share
    with pytest.raises(ValueError, match=f"at most {MAX_SHARES} shares"):
        evidence.skip(0.99, 1)
