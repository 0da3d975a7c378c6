"""E-values, bounds and the change detector: comparison with their definitions, text by text, and their guarantees."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import betting
from de3.exits.betting import ChangeDetector, bounds, e_value, e_values, e_values_above

streams = st.lists(st.booleans(), max_size=40)  # for each audited text, whether it differs
RATES = [0.001, 0.02, 0.3, 0.9]


def counts(stream: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(stream)]), np.array([sum(stream)])


@given(streams, st.sampled_from(RATES))
def test_e_values_are_the_wealth_of_gamblers(stream: list[bool], rate: float) -> None:
    lower = [np.prod([1 + c * (rate - d) for d in stream]) for c in betting.LOWER]
    assert e_values(*counts(stream), np.array([rate]))[0] == pytest.approx(np.mean(lower), rel=1e-9)
    assert e_value(len(stream), sum(stream), rate) == pytest.approx(np.mean(lower), rel=1e-9)
    bets = [
        np.prod([1 + min(k, betting.MOST_LOSS / rate) * (d - rate) for d in stream]) for k in betting.HIGHER
    ]
    assert e_values_above(*counts(stream), np.array([rate]))[0] == pytest.approx(np.mean(bets), rel=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_the_mean_wealth_is_1_at_the_rate_that_is_bet_against(rate: float) -> None:
    """The mean is over all outcomes of three texts.

    It is above 1 if the true rate is on the side that is bet on, and below 1 if it is on the other side.
    """

    def mean(function: object, truth: float) -> float:
        total = 0.0
        for outcome in product([False, True], repeat=3):
            p = np.prod([truth if d else 1 - truth for d in outcome])
            total += p * function(*counts(list(outcome)), np.array([rate]))[0]  # type: ignore[operator]
        return float(total)

    assert mean(e_values, rate) == pytest.approx(1)
    assert mean(e_values, rate * 1.5) < 1 < mean(e_values, rate / 2)
    assert mean(e_values_above, rate) == pytest.approx(1)
    assert mean(e_values_above, rate / 2) < 1 < mean(e_values_above, rate * 1.5)


@given(st.sampled_from(RATES), streams, st.integers(0, 40))
def test_audits_count_together_as_one_by_one(rate: float, stream: list[bool], split: int) -> None:
    together, apart = ChangeDetector(rate, 50.0), ChangeDetector(rate, 50.0)
    fired = apart.count(stream[:split]) or apart.count(stream[split:])
    assert together.count(stream) == fired
    assert together.wealth == apart.wealth
    assert not stream or min(apart.wealth) > 0  # no gambler can owe anything


@settings(max_examples=20)
@given(st.floats(0.01, 0.5))
def test_the_mean_wealth_of_the_detector_is_its_stake(rate: float) -> None:
    mean = np.zeros(3)
    for outcome in product([False, True], repeat=3):
        detector = ChangeDetector(rate, 1e5)
        detector.count(outcome)
        mean += np.prod([rate if d else 1 - rate for d in outcome]) * np.array(detector.wealth)
    np.testing.assert_allclose(mean, 3, rtol=1e-9)


def test_each_bound_is_where_its_e_value_reaches_2_over_the_error_probability() -> None:
    """Each of the two sides has half of the error probability."""
    audits, differing = np.array([700, 700, 600]), np.array([12, 60, 300])
    lower, upper = bounds(audits, differing, 0.8)
    enough = [2 / (1 - 0.8)]
    for k in range(3):  # each column has its own bounds
        alone = audits[[k]], differing[[k]]
        assert e_values(*alone, upper[[k]]) == pytest.approx(enough, abs=1e-4)
        assert e_values_above(*alone, lower[[k]]) == pytest.approx(enough, abs=1e-4)
    assert bounds(audits, 0 * differing, 0.8)[0].tolist() == [0, 0, 0]


def test_the_detector_fires_once_all_gamblers_together_own_enough() -> None:
    """The wealth at one bet size must not suffice: that would violate the guaranteed mean time to a false alarm."""
    detector, means = ChangeDetector(0.1, 1000.0), [0.0]
    while len(means) < 100 and not detector.count([True]):
        means.append(float(np.mean(detector.wealth)))
    assert means[-1] < 1000 <= np.mean(detector.wealth) < max(detector.wealth) / 2


def test_e_values_of_many_texts_are_finite() -> None:
    counted = np.array([10**6, 10**6]), np.array([0, 10**6])
    rates = np.array([0.5, 0.5])
    assert np.isfinite(e_values(*counted, rates)).all() and np.isfinite(e_values_above(*counted, rates)).all()
