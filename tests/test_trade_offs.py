"""From a target to τ: the bounds of the guarantee, the choice of a row of the table, and drift and OOD scores."""

import math
from itertools import pairwise, takewhile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import bound, reference
from de3.exits.trade_offs import MIN_GAIN, TradeOffs


def test_a_bound_needs_errors_among_samples_and_a_table_full_depth() -> None:
    for errors, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="errors must be"):
            bound.upper_bound(errors, n)
    with pytest.raises(ValueError, match="begins with"):
        TradeOffs([SimpleNamespace(tau=0.5)])


@given(st.integers(1, 400), st.data())
def test_at_the_bound_so_few_errors_have_a_probability_of_5_percent(n: int, data: st.DataObject) -> None:
    errors = data.draw(st.integers(0, n - 1))
    most = bound.upper_bound(errors, n)
    assert bound.upper_bound(n, n) == 1
    cdf = sum(math.comb(n, k) * most**k * (1 - most) ** (n - k) for k in range(errors + 1))
    assert errors / n < most <= 1
    assert cdf == pytest.approx(0.05, abs=1e-6)


def made(steps: list[tuple[float, float, float, float]]) -> list[Any]:
    """The rows of a table: factors of the speed-up, increments of the bound, disagreements, and accuracies."""
    rows, speedup, bound = [], 1.0, 0.0
    for k, (faster, more, disagreement, accuracy) in enumerate(steps):
        speedup, bound = speedup * faster, bound + more
        rows.append(
            SimpleNamespace(
                tau=k / 10,
                speedup=speedup,
                disagreement_bound=bound,
                disagreement=disagreement,
                accuracy=accuracy,
            )
        )
    return rows


# Few different values, so that rows often equal each other, and the limits.
tables = st.lists(
    st.tuples(
        st.sampled_from([1.0, 1.05, MIN_GAIN, 1.5]),
        st.sampled_from([0.0, 0.01]),
        st.sampled_from([0.0, 0.01, 0.02]),
        st.sampled_from([0.8, 0.9]),
    ),
    min_size=1,
    max_size=8,
).map(made)
limits = st.sampled_from([0.0, 0.005, 0.01, 0.02, 0.05])


@given(tables, st.data(), st.sampled_from([0.99, 1.0, 1.01]))
def test_a_speed_up_is_met_by_the_smallest_tau(rows: list[Any], data: st.DataObject, factor: float) -> None:
    wanted = data.draw(st.sampled_from(rows)).speedup * factor
    found = TradeOffs(rows[::-1]).at_speedup(wanted)
    assert found is next((row for row in rows if row.speedup >= wanted), None)


@given(tables, limits)
def test_a_limit_of_disagreement_is_met_by_the_last_tau_within_it(rows: list[Any], most: float) -> None:
    trade_offs = TradeOffs(rows)
    certified = takewhile(lambda row: row.disagreement_bound <= most, rows[1:])
    assert trade_offs.within_disagreement(most) is [rows[0], *certified][-1]
    measured = takewhile(lambda row: row.disagreement <= most, rows[1:])
    assert trade_offs.at_disagreement(most) is [rows[0], *measured][-1]


@given(tables, st.sampled_from([0.0, 0.05, 0.1, 0.25]), st.sampled_from([0.0, 0.8, 0.9]))
def test_steps_under_load_get_faster_and_stop_before_the_first_below_the_limit(
    rows: list[Any], tau: float, accuracy: float
) -> None:
    steps = [
        max((row for row in rows if row.tau <= tau), key=lambda row: row.speedup),
        *TradeOffs(rows).under_load(tau, accuracy),
    ]
    assert all(row.accuracy >= accuracy for row in steps[1:])
    above = [row for row in rows if row.tau > tau]
    for step, after in pairwise([*steps, None]):
        faster = (row for row in above if row.tau > step.tau and row.speedup >= MIN_GAIN * step.speedup)
        following = next(faster, None)
        if after is not None or following is None:
            assert following is after
        else:
            assert following.accuracy < accuracy


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


def test_many_equal_values_are_not_drift() -> None:
    rng = np.random.default_rng(2)
    values = np.maximum(0.0, rng.normal(size=4000)) * 1e-6 * rng.integers(0, 2, 4000)  # mostly 0: confident
    known = reference.quantiles(values)
    window = rng.choice(values, 500).tolist()
    assert reference.psi(window, known) < 0.2 and reference.ks(window, known) < 0.1
    third = reference.quantiles(np.full(9, 1 / 3))  # they are rounded, and so must be the window's values
    assert reference.ks([1 / 3] * 50, third) == 0 and reference.psi([1 / 3] * 50, third) < 0.3


def test_a_tail_is_the_share_of_calibration_beyond_a_value() -> None:
    for level in (0.1, 0.5, 0.95, 0.99):
        assert reference.tail(float(np.quantile(SAMPLE, level)), KNOWN) == pytest.approx(1 - level, abs=0.01)
    assert reference.tail(0.9 * KNOWN[-2] + 0.1 * KNOWN[-1], KNOWN) == pytest.approx(0.0009)
    assert reference.tail(99.0, KNOWN) == reference.MIN_TAIL
    assert reference.ood_score([], []) is None


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
