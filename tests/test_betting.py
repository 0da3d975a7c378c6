"""E-values, bounds and the change detector: comparison with their definitions, text by text, and their guarantees."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import betting
from de3.exits.betting import ChangeDetector, bounds, e_values, e_values_above

SHARES = (1.0, 0.5, 0.05)
# For each text: the probability with which it was drawn, whether it was drawn, whether it differs.
streams = st.lists(st.tuples(st.sampled_from(SHARES), st.booleans(), st.booleans()), max_size=40)


def counts(stream: list[tuple[float, bool, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    texts = [sum(q == share for q, _, _ in stream) for share in SHARES]
    differing = [[sum(q == share and drawn and differs for q, drawn, differs in stream)] for share in SHARES]
    return np.array(SHARES), np.array(texts), np.array(differing)


def values(stream: list[tuple[float, bool, bool]]) -> list[tuple[float, float]]:
    """For each text: q, and X = A·d/q, where A is 1 if it was drawn and d is 1 if it differs."""
    return [(q, float(drawn and differs) / q) for q, drawn, differs in stream]


@given(streams, st.sampled_from([0.001, 0.02, 0.3, 0.9]))
def test_e_values_are_the_wealth_of_gamblers(stream: list[tuple[float, bool, bool]], rate: float) -> None:
    lower = [np.prod([1 + c * q * (rate - x) for q, x in values(stream)]) for c in betting.LOWER]
    assert e_values(*counts(stream), np.array([rate]))[0] == pytest.approx(np.mean(lower), rel=1e-9)
    bets = [
        np.prod([1 + min(k * q, betting.MOST_LOSS / rate) * (x - rate) for q, x in values(stream)])
        for k in betting.HIGHER
    ]
    assert e_values_above(*counts(stream), np.array([rate]))[0] == pytest.approx(np.mean(bets), rel=1e-9)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_the_mean_wealth_is_1_at_the_rate_that_is_bet_against(share: float, rate: float) -> None:
    """The mean is over all outcomes of three texts.

    It is above 1 if the true rate is on the side that is bet on, and below 1 if it is on the other side.
    """

    def mean(function: object, truth: float) -> float:
        total = 0.0
        for outcome in product([(False, False), (True, False), (True, True)], repeat=3):
            p = np.prod([share * (truth if d else 1 - truth) if a else 1 - share for a, d in outcome])
            arguments = np.array([share]), np.array([3]), np.array([[sum(d for _, d in outcome)]])
            total += p * function(*arguments, np.array([rate]))[0]  # type: ignore[operator]
        return float(total)

    assert mean(e_values, rate) == pytest.approx(1)
    assert mean(e_values, rate * 1.5) < 1 < mean(e_values, rate / 2)
    assert mean(e_values_above, rate) == pytest.approx(1)
    assert mean(e_values_above, rate / 2) < 1 < mean(e_values_above, rate * 1.5)


@given(streams)
def test_bounds_enclose_the_rate_and_are_in_order(stream: list[tuple[float, bool, bool]]) -> None:
    lower, upper = bounds(*counts(stream), 0.95)
    assert 0 <= lower[0] <= upper[0] <= 1
    if not any(drawn and differs for _, drawn, differs in stream):
        assert lower[0] == 0


@given(
    st.floats(0.001, 0.9),
    st.sampled_from(SHARES),
    st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=12),
    st.integers(0, 9),
)
def test_texts_count_together_as_one_by_one(
    rate: float, share: float, texts: list[tuple[int, bool]], after: int
) -> None:
    together, single, fired = ChangeDetector(rate, 50.0), ChangeDetector(rate, 50.0), False
    for skipped, differs in texts:
        for _ in range(skipped):
            single.count(share, [], [1])
        if fired := single.count(share, [differs], [0, 0]):
            break
    for _ in range(0 if fired else after):
        single.count(share, [], [1])
    found = together.count(share, [differs for _, differs in texts], [*(n for n, _ in texts), after])
    assert found == fired
    np.testing.assert_allclose(together.wealth, single.wealth, rtol=1e-9)


@settings(max_examples=20)
@given(st.floats(0.01, 0.5), st.sampled_from(SHARES))
def test_the_mean_wealth_of_the_detector_is_its_stake(rate: float, share: float) -> None:
    mean = np.zeros(3)
    for outcome in product([(False, False), (True, False), (True, True)], repeat=3):
        p, detector = 1.0, ChangeDetector(rate, 1e5)
        for drawn, differs in outcome:
            p *= share * (rate if differs else 1 - rate) if drawn else 1 - share
            detector.count(share, [differs] * drawn, [0, 0] if drawn else [1])
        mean += p * np.array(detector.wealth)
    np.testing.assert_allclose(mean, 3 * share, rtol=1e-9)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_each_bound_is_where_its_e_value_reaches_2_over_the_error_probability(confidence: float) -> None:
    """Each of the two sides has half of the error probability."""
    shares, texts = np.array([1.0, 0.25]), np.array([600, 400])
    differing = np.array([[12, 60, 300], [2, 15, 40]])
    lower, upper = bounds(shares, texts, differing, confidence)
    enough = [2 / (1 - confidence)]
    for k in range(3):  # each column has its own bounds
        alone = shares, texts, differing[:, [k]]
        assert e_values(*alone, upper[[k]]) == pytest.approx(enough, abs=1e-4)
        assert e_values_above(*alone, lower[[k]]) == pytest.approx(enough, abs=1e-4)


def test_the_detector_fires_once_all_gamblers_together_own_enough() -> None:
    """The wealth at one bet size must not suffice: that would violate the guaranteed mean time to a false alarm."""
    detector, means = ChangeDetector(0.1, 1000.0), [0.0]
    while len(means) < 100 and not detector.count(1.0, [True], [0, 0]):
        means.append(float(np.mean(detector.wealth)))
    assert means[-1] < 1000 <= np.mean(detector.wealth) < max(detector.wealth) / 2


@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_no_gambler_of_the_detector_can_owe_anything(rate: float) -> None:
    detector = ChangeDetector(rate, 1e5)
    for _ in range(5):
        detector.count(1.0, [False], [0, 3])
        assert min(detector.wealth) > 0


def test_e_values_of_many_texts_are_finite() -> None:
    counted = np.array([1.0]), np.array([10**6]), np.array([[0, 10**6]])
    rates = np.array([0.5, 0.5])
    assert np.isfinite(e_values(*counted, rates)).all() and np.isfinite(e_values_above(*counted, rates)).all()
