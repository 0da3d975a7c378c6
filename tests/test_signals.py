"""The signals: hand-computed cases, limits, and properties that must hold for any input."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.exits import formulas


def test_a_case_computed_by_hand() -> None:
    # p = (0.8, 0.2): H = −0.8·ln 0.8 − 0.2·ln 0.2 = 0.500402; / ln 2 = 0.721928
    # r1 = 0.2, r2 = 0.5: DR = ½·(1 − 0.3/0.5) = 0.2
    # λ = 2: EDR = 3/(2/0.2 + 1/0.721928) = 3/11.385179 = 0.263500
    logits = np.log([0.8, 0.2])
    h = formulas.entropy(formulas.softmax(logits))
    dr = formulas.distance_ratio(logits, [0.2, 0.5])
    assert h == pytest.approx(0.721928, abs=1e-6)
    assert dr == pytest.approx(0.2)
    assert formulas.edr(h, dr, 2.0) == pytest.approx(0.263500, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 150])
def test_entropy_limits(k: int) -> None:
    assert formulas.entropy(np.eye(k)[1]) == 0
    assert formulas.entropy(np.full(k, 1 / k)) == pytest.approx(1)
    assert formulas.entropy(np.full(k, 1 / k)) <= 1
    with pytest.raises(ValueError, match="at least 2 classes"):
        formulas.entropy([1.0])


def test_distance_ratio_limits() -> None:
    assert formulas.distance_ratio([2.0, 1.0], [0.0, 0.0]) == 0.5  # both on their prototypes
    assert formulas.distance_ratio([2.0, 1.0], [0.0, 0.7]) == 0  # geometry agrees fully
    assert formulas.distance_ratio([2.0, 1.0], [0.7, 0.0]) == 1  # and contradicts fully
    assert formulas.distance_ratio([2.0, 1.0], [-1e-7, 0.7]) == 0  # rounding below 0 is 0
    assert math.isnan(formulas.distance_ratio([2.0, 1.0], [math.nan, math.nan]))


def test_ties_rank_the_lowest_index_first() -> None:
    assert formulas.distance_ratio([1.0, 1.0, 1.0], [0.1, 0.5, 0.9]) == pytest.approx(0.5 * (1 - 0.4 / 0.5))
    assert formulas.distance_ratio([0.0, 1.0, 1.0], [0.1, 0.5, 0.9]) == pytest.approx(0.5 * (1 - 0.4 / 0.9))


def test_logits_too_far_apart_for_softmax_are_still_ranked() -> None:
    found = formulas.distance_ratio([0.0, -2000.0, -1000.0], [0.2, 0.1, 0.8])
    assert found == pytest.approx(0.5 * (1 - 0.75))


def test_edr_limits() -> None:
    assert formulas.edr(0.3, 0.9, 0) == 0.3  # λ = 0 is entropy alone
    assert formulas.edr(0.3, 0.0, 0) == 0.3  # whatever DR is
    assert formulas.edr(0.3, math.nan, 0) == 0.3
    assert formulas.edr(0.0, 0.4, 2) == formulas.edr(0.4, 0.0, 2) == 0
    assert formulas.edr(0.0, 0.0, 2) == 0
    assert formulas.edr(1.0, 1.0, 5) == 1


@given(st.floats(1e-3, 1), st.floats(1e-3, 1), st.floats(0.01, 100))
def test_edr_is_the_papers_formula(h: float, dr: float, lam: float) -> None:
    assert formulas.edr(h, dr, lam) == pytest.approx((lam + 1) / (lam / dr + 1 / h))
