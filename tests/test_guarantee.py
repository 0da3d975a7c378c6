"""The τ that a guarantee allows: profiles, the fixed order of the tests, the fall after a change, and restarts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import betting
from de3.exits.bound import CONFIDENCE
from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import (
    MAX_SHARES,
    Evidence,
    Guarantee,
    Profiles,
    RecentRates,
    SavedGuarantee,
    profiles,
)
from de3.exits.rule import ExitRule, exit_index
from de3.exits.signals import Entropy

TAUS = np.array(FINE_TAUS[::8])
GRID = np.array([0.0, 0.1, 0.2, 0.4])
LAYERS = np.array([[3, 2, 1, 0]])
CLEAN = Profiles(np.zeros((1, 4), np.bool_), LAYERS)


def unlike_from(index: int) -> Profiles:
    """The profile of a text whose answer differs at every τ of GRID from this index on."""
    return Profiles(np.arange(4)[None] >= index, LAYERS)


def step(guarantee: Guarantee, share: float, audit: Profiles, is_repeat: bool = False) -> bool:
    """Count an audit, and let τ rise if the evidence allows it; returns True if τ changed."""
    before = guarantee.index
    guarantee.count(share, audit, np.array([is_repeat]))
    guarantee.advance()
    return guarantee.index != before


# Some scores equal a τ of the grid: at that τ, a text must not exit.
scores = st.lists(
    st.one_of(st.none(), st.just(float("nan")), st.floats(0, 1), st.sampled_from(TAUS.tolist())),
    min_size=1,
    max_size=7,
)


@given(scores, st.data())
def test_a_profile_is_what_the_rule_does(values: list[float | None], data: st.DataObject) -> None:
    differs = [*data.draw(st.lists(st.booleans(), min_size=len(values) - 1, max_size=len(values) - 1)), False]
    layers = list(range(len(values)))
    audit = profiles([values], [differs], layers, TAUS)
    row = np.array([[np.nan if v is None else v for v in values]])
    for k, tau in enumerate(TAUS.tolist()):
        rule = ExitRule(tau, Entropy())
        index = next((i for i, v in enumerate(values[:-1]) if rule.exits(v)), len(values) - 1)
        assert index == exit_index(row.copy(), tau)[0]
        assert (audit.differs[0, k], audit.layers[0, k]) == (differs[index], layers[index])


def test_tau_rises_in_the_fixed_order_up_to_the_first_that_is_not_proved() -> None:
    guarantee = Guarantee(0.1, GRID)
    assert (guarantee.tau, guarantee.reason) == (0.0, "start")
    # At τ = 0.2 every fifth text differs, at τ = 0.4 none does. Even so, τ must stay at 0.1.
    odd = Profiles(np.array([[False, False, True, False]]), LAYERS)
    for n in range(1000):
        step(guarantee, 1.0, odd if n % 5 == 0 else CLEAN)
    assert (guarantee.tau, guarantee.reason) == (0.1, "evidence")
    assert guarantee.evidence.e_values(0.1)[3] > 20


def test_each_audit_is_weighted_by_the_inverse_of_its_share() -> None:
    evidence = Evidence(GRID)
    for share, differ in ((1.0, 1), (0.1, 3)):
        for n in range(10):
            evidence.add(share, unlike_from(1 if n < differ else 4), n < differ)
    assert evidence.rates()[1] == pytest.approx((1 + 30) / (10 + 100))
    assert evidence.served() == evidence.rates()[1]
    assert evidence.mean_layers()[2] == pytest.approx(1)


def test_a_rise_above_the_guarantee_discards_the_evidence() -> None:
    guarantee, rng = Guarantee(0.1, GRID), np.random.default_rng(3)
    for _ in range(100):
        step(guarantee, 1.0, CLEAN)
    assert guarantee.tau == 0.4
    for _ in range(500):
        step(guarantee, 1.0, unlike_from(3 if rng.random() < 0.05 else 4))
    assert (guarantee.tau, guarantee.reason) == (0.4, "evidence")
    reasons = []
    while guarantee.reason != "change":
        step(guarantee, 1.0, unlike_from(3 if rng.random() < 0.15 else 4))
        reasons.append(guarantee.reason)
        assert len(reasons) < 3000
    assert set(reasons) == {"evidence", "recent", "change"}  # τ falls before the change is certain
    assert guarantee.tau == 0.0
    assert (guarantee.evidence.audits, guarantee.evidence.texts, guarantee.recent.weight) == (0, 0, 0)
    assert not any(guarantee.saved().detector)


def test_a_guarantee_continues_where_another_left_off() -> None:
    first, second = Guarantee(0.1, GRID), Guarantee(0.1, GRID)
    for n in range(150):
        step(first, 1.0, unlike_from(3 if n % 3 == 0 else 4))
    second.restore(first.evidence, first.saved())
    assert (second.tau, second.reason) == (first.tau, first.reason) == (0.2, "evidence")
    for guarantee in (first, second):
        step(guarantee, 0.1, unlike_from(2))
    assert first.saved() == second.saved()
    # Only the evidence is used if the proof was for another rate, or had a larger error probability.
    for other in (Guarantee(0.01, GRID), Guarantee(0.1, GRID, error=1e-9)):
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
    ],
)
def test_a_saved_guarantee_that_does_not_fit_is_not_restored(change: dict[str, Any]) -> None:
    saved = {"tau": 0.1, "detector": [0.0] * 3, "recent": [0.0] * 4} | change
    with pytest.raises(ValueError, match="does not match the τ grid"):
        Guarantee(0.1, GRID).restore(
            Evidence(GRID), SavedGuarantee(rate=0.1, reason="evidence", weight=2.0, **saved)
        )


def test_a_repeat_counts_only_against_a_higher_tau() -> None:
    evidence, other = Evidence(GRID), Evidence(GRID)
    for n in range(30):
        for one in (evidence, other):
            one.add(1.0, unlike_from(3 if n % 10 == 0 else 4))
    before = evidence.e_values(0.1)
    evidence.add_repeats(1.0, CLEAN.differs)
    assert evidence.e_values(0.1).tolist() == before.tolist()
    evidence.add_repeats(1.0, unlike_from(2).differs)
    other.add(1.0, unlike_from(2))
    after = evidence.e_values(0.1)
    assert after.tolist() == [*before[:2], *other.e_values(0.1)[2:]]
    assert (after[2:] < before[2:]).all()
    assert [evidence.e_value(0.1, k) for k in range(4)] == pytest.approx(after.tolist())


def test_repeated_texts_are_not_a_change() -> None:
    guarantee, rng = Guarantee(0.1, GRID), np.random.default_rng(5)
    texts = [unlike_from(3) if n % 30 == 0 else CLEAN for n in range(300)]
    for audit in texts:
        step(guarantee, 1.0, audit)
    assert guarantee.tau == 0.4
    for _ in range(2500):
        step(guarantee, 0.2, texts[rng.integers(300)], is_repeat=True)
    assert (guarantee.tau, guarantee.reason) == (0.4, "evidence")


def test_recent_audits_lower_tau_at_once_and_it_rises_again_only_when_told_to() -> None:
    """The disagreement rises too little for the change detector, so the proof stays valid."""
    guarantee = Guarantee(0.1, GRID)
    for _ in range(600):
        guarantee.count(1.0, CLEAN)
    assert guarantee.tau == 0
    assert guarantee.recent.weight < 300  # at τ = 0, the window is the shortest
    guarantee.advance()
    assert guarantee.tau == 0.4
    for n in range(3000):
        guarantee.count(1.0, unlike_from((3, 4)[n % 9 > 0]))  # 11%
    assert (guarantee.tau, guarantee.reason, guarantee.proved) == (0.2, "recent", 3)
    for n in range(1200):
        guarantee.count(1.0, unlike_from((3, 4)[n % 20 > 0]))  # 5%
    assert (guarantee.tau, guarantee.reason) == (0.2, "recent")
    guarantee.advance()
    assert (guarantee.tau, guarantee.reason) == (0.4, "evidence")


@pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
def test_a_share_and_a_guaranteed_rate_are_probabilities_above_0(value: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Evidence(GRID).add(value, CLEAN)
    with pytest.raises(ValueError, match="guarantee"):
        Guarantee(value, GRID)


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
    bounds = betting.bounds(np.array([600]), np.array([30]), CONFIDENCE)
    assert bounds[1][0] < rates[1] == upper[1]


def test_more_audits_are_recent_while_more_texts_are_audited_or_the_guarantee_is_small() -> None:
    def filled(rate: float, share: float) -> RecentRates:
        recent = RecentRates(rate, 4)
        for _ in range(10):
            recent.add(share, np.zeros((1000, 4), np.bool_))
        return recent

    for share, weight in ((0.01, 300), (0.05, 300), (0.25, 300), (0.5, 600), (1.0, 1200)):
        recent = filled(0.02, share)
        assert round(recent.weight) == weight
        # Only with many audits is the standard error so small that 1.5% is more than one standard error below 2%.
        recent.differing = np.full(4, 0.015 * recent.weight)
        assert recent.allows(3) == (3 if share > 0.5 else 0)
    assert round(filled(0.01, 0.05).weight) == 600  # which have 6 disagreements at the guaranteed rate


def test_a_full_window_of_recent_audits_or_a_third_of_one_lowers_tau_at_once() -> None:
    """The standard error is that of a full window."""
    recent, few = RecentRates(0.02, 4), RecentRates(0.1, 4)
    recent.add(1.0, np.zeros((4000, 4), np.bool_))
    unlike = unlike_from(2).differs
    for _ in range(9):
        recent.add(0.05, unlike)  # with a smaller share, the window is the shortest
    assert recent.allows(3) == 1
    for count in range(102):
        assert few.allows(3) == (3 if few.weight < 100 else 1), count
        few.add(0.05, unlike)
    few.weight, few.differing = 150.0, np.full(4, 0.08 * 150)
    assert few.allows(3) == 3


def test_counted_shares_are_limited() -> None:
    evidence = Evidence(GRID)
    for number in range(MAX_SHARES):
        evidence.skip((1 + number) / MAX_SHARES, 1)
    evidence.skip(1 / MAX_SHARES, 1)  # not a new share
    with pytest.raises(ValueError, match=f"at most {MAX_SHARES} shares"):
        evidence.skip(0.99, 1)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 0.5, 0.05]), st.lists(st.tuples(st.integers(0, 4), st.booleans()))),
        max_size=4,
    )
)
def test_audits_count_together_as_one_by_one(batches: list[tuple[float, list[tuple[int, bool]]]]) -> None:
    """τ aside, which falls at the end of a request only."""
    together, single = Guarantee(0.3, GRID), Guarantee(0.3, GRID)
    for share, texts in batches:
        found = [unlike_from(first) for first, _ in texts]
        differs = np.array([audit.differs[0] for audit in found], np.bool_).reshape(-1, 4)
        audits = Profiles(differs, LAYERS.repeat(len(texts), 0))
        together.count(share, audits, np.array([is_repeat for _, is_repeat in texts], np.bool_))
        for audit, (_, is_repeat) in zip(found, texts, strict=True):
            single.count(share, audit, np.array([is_repeat]))
    assert together.evidence.texts == single.evidence.texts
    assert together.evidence.rates().tolist() == pytest.approx(single.evidence.rates().tolist(), nan_ok=True)
    assert together.evidence.e_values(0.3).tolist() == pytest.approx(single.evidence.e_values(0.3).tolist())
    assert together.recent.weight == pytest.approx(single.recent.weight)
    assert together.recent.differing.tolist() == pytest.approx(single.recent.differing.tolist())
