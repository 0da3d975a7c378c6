"""From a target to τ: the bounds of the guarantee, the choice of a row of the table, and drift and OOD scores."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import calibration, guarantee, reference
from de3.exits.calibration import Samples
from de3.exits.signals import Edr
from de3.exits.trade_offs import TradeOffs
from tests.test_calibration import recorded


def table(seed: int = 0, n: int = 400) -> list[calibration.Outcome]:
    return calibration.trade_off(Samples.independent(recorded(n, seed)), Edr(1.0))


def test_the_bound_is_clopper_and_pearsons() -> None:
    assert guarantee.upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert guarantee.upper_bound(1, 10) == pytest.approx(0.394163, abs=1e-6)
    assert guarantee.upper_bound(10, 10) == 1.0
    assert guarantee.upper_bound(58, 3955) == pytest.approx(0.018217, abs=1e-6)


@pytest.mark.parametrize(("errors", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_a_bound_needs_errors_among_samples(errors: int, n: int) -> None:
    with pytest.raises(ValueError, match="errors must be"):
        guarantee.upper_bound(errors, n)


@given(st.integers(1, 400), st.data())
def test_at_the_bound_so_few_errors_have_a_probability_of_5_percent(n: int, data: st.DataObject) -> None:
    errors = data.draw(st.integers(0, n - 1))
    bound = guarantee.upper_bound(errors, n)
    cdf = sum(math.comb(n, k) * bound**k * (1 - bound) ** (n - k) for k in range(errors + 1))
    assert errors / n < bound <= 1
    assert cdf == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_a_table_never_fall(seed: int) -> None:
    rows = table(seed, 50)[1:]
    bounds = [row.disagreement_bound for row in rows]
    assert bounds == sorted(bounds)
    least = [guarantee.upper_bound(round(50 * row.disagreement), 50) for row in rows]
    assert all(bound >= own for bound, own in zip(bounds, least, strict=True))


@pytest.mark.slow
def test_the_promise_is_broken_in_at_most_5_percent_of_calibrations() -> None:
    population = recorded(20_000, 1)
    samples = Samples.independent(population)
    taus = calibration.TAUS[::3]
    truth = {row.tau: row.disagreement for row in calibration.trade_off(samples, Edr(1.0), taus)}
    rng, trials = np.random.default_rng(0), 400
    chosen: dict[float, list[float]] = {0.03: [], 0.08: []}
    for _ in range(trials):
        few = population.rows(rng.choice(len(population.labels), 500, replace=False))
        trade_offs = TradeOffs(calibration.trade_off(Samples.independent(few), Edr(1.0), taus))
        for most, found in chosen.items():
            found.append(trade_offs.within_disagreement(most).tau)
    for most, found in chosen.items():
        broken = sum(truth[tau] > most for tau in found)
        assert broken / trials <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)
        assert np.median(found) > 0  # a certificate with τ > 0 exists


@given(st.integers(0, 8), st.lists(st.floats(1, 50), min_size=2, max_size=5))
def test_a_larger_speed_up_never_gives_a_smaller_tau(seed: int, targets: list[float]) -> None:
    trade_offs = TradeOffs(table(seed % 3))
    found = [trade_offs.at_speedup(target) for target in sorted(targets)]
    taus = [math.inf if row is None else row.tau for row in found]
    assert taus == sorted(taus)
    for target, row in zip(sorted(targets), found, strict=True):
        if row is None:
            assert trade_offs.rows[-1].speedup < target
        else:
            assert row.speedup >= target
            assert all(other.speedup < target for other in trade_offs.rows if other.tau < row.tau)


@given(st.integers(0, 2), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_more_disagreement_never_gives_a_smaller_tau(seed: int, wanted: list[float]) -> None:
    trade_offs = TradeOffs(table(seed))
    found = [trade_offs.within_disagreement(most) for most in sorted(wanted)]
    assert [row.tau for row in found] == sorted(row.tau for row in found)
    for most, row in zip(sorted(wanted), found, strict=True):
        assert row.disagreement_bound <= most
        assert all(o.disagreement_bound > most for o in trade_offs.rows if o.tau > row.tau)


def test_a_limit_too_small_for_any_early_exit_is_full_depth() -> None:
    assert TradeOffs(table()).within_disagreement(0.0).tau == 0


def test_steps_under_load_get_faster_and_stop_at_the_floor() -> None:
    trade_offs = TradeOffs(table(n=2000))
    full = trade_offs.rows[0].accuracy
    steps = trade_offs.under_load(0.01, full - 0.05, 1.0)
    assert steps
    assert all(row.tau > 0.01 and row.accuracy >= full - 0.05 for row in steps)
    speeds = [row.speedup for row in steps]
    assert all(b >= 1.1 * a for a, b in pairwise(speeds))
    assert len(trade_offs.under_load(0.01, full - 0.05, 0.02)) < len(steps)
    assert trade_offs.under_load(0.01, 1.0, 1.0) == []


def test_a_table_without_full_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="begins with"):
        TradeOffs([replace(table()[0], tau=0.5)])


SAMPLE = np.random.default_rng(0).gamma(2.0, size=4000)
KNOWN = reference.quantiles(SAMPLE)


@settings(max_examples=50)
@given(st.lists(st.floats(-1, 30), min_size=1, max_size=60))
def test_ks_is_the_largest_gap(values: list[float]) -> None:
    values = [round(x, reference.DIGITS) for x in values]
    grid = np.concatenate([np.linspace(-2, 31, 4000), values])
    ours = np.searchsorted(np.sort(values), grid, side="right") / len(values)
    theirs = np.interp(grid, KNOWN, reference.LEVELS, left=0, right=1)
    assert reference.ks(values, KNOWN) >= np.abs(ours - theirs).max() - 1e-9
    assert reference.ks(values, KNOWN) <= 1


def test_alike_windows_do_not_drift_and_others_do() -> None:
    rng = np.random.default_rng(1)
    alike, other = rng.choice(SAMPLE, 500).tolist(), (rng.choice(SAMPLE, 500) + 2).tolist()
    assert reference.psi(alike, KNOWN) < 0.1 < 0.25 < reference.psi(other, KNOWN)
    assert reference.ks(alike, KNOWN) < 0.1 < 0.3 < reference.ks(other, KNOWN)


def test_many_equal_values_are_not_drift() -> None:
    rng = np.random.default_rng(2)
    values = np.maximum(0.0, rng.normal(size=4000)) * 1e-6 * rng.integers(0, 2, 4000)  # mostly 0: confident
    known = reference.quantiles(values)
    window = rng.choice(values, 500).tolist()
    assert reference.psi(window, known) < 0.2 and reference.ks(window, known) < 0.1
    assert reference.psi([0.5] * 500, known) > 1


@given(st.floats(-5, 50), st.floats(-5, 50))
def test_farther_values_are_more_unusual(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 1 >= reference.tail(low, KNOWN) >= reference.tail(high, KNOWN) >= reference.MIN_TAIL
    scores = [reference.ood_score([x, 1.0], [KNOWN, KNOWN]) for x in (low, high)]
    assert scores[0] is not None and scores[1] is not None
    assert 0 <= scores[0] <= scores[1] < 1


def test_a_tail_is_the_share_of_calibration_beyond_a_value() -> None:
    for level in (0.1, 0.5, 0.95, 0.99):
        assert reference.tail(float(np.quantile(SAMPLE, level)), KNOWN) == pytest.approx(1 - level, abs=0.01)
    assert reference.tail(99.0, KNOWN) == reference.MIN_TAIL
    assert reference.ood_score([], []) is None


def test_nothing_beyond_the_first_row_that_breaks_a_limit_is_chosen() -> None:
    """This holds even if a later row is within the limit again."""
    rows = [
        SimpleNamespace(tau=k / 10, speedup=2.0**k, accuracy=accuracy, disagreement=disagreement)
        for k, (accuracy, disagreement) in enumerate(
            [(0.9, 0.0), (0.9, 0.01), (0.9, 0.01), (0.7, 0.2), (0.9, 0.01)]
        )
    ]
    for row in rows:
        row.disagreement_bound = row.disagreement
    trade_offs = TradeOffs(rows)
    assert trade_offs.at_disagreement(0.1) is rows[2]
    assert trade_offs.under_load(0.0, 0.8, 1.0) == trade_offs.under_load(0.0, 0.0, 0.1) == rows[1:3]
    assert trade_offs.under_load(0.0, 0.0, 1.0) == rows[1:]


def test_a_text_that_is_as_unusual_at_every_exit_is_as_unusual_as_at_one() -> None:
    alone = reference.ood_score([4.0], [KNOWN])
    assert alone == 1 - reference.tail(4.0, KNOWN)
    assert reference.ood_score([4.0] * 3, [KNOWN] * 3) == pytest.approx(alone)


def test_the_stability_index_of_a_window_in_one_decile_by_hand() -> None:
    """10 values are in the first of 10 bins. Each bin starts at ½, so the first has 10.5 of 15, the others 0.5 each."""
    values = [reference.quantiles(SAMPLE)[1]] * 10
    first, other = 10.5 / 15, 0.5 / 15
    expected = (first - 0.1) * math.log(first / 0.1) + 9 * (other - 0.1) * math.log(other / 0.1)
    assert reference.psi(values, KNOWN) == pytest.approx(expected)
