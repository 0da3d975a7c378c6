"""The decision: the first exit whose score is strictly below τ, else the last exit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from de3.exits import formulas
from de3.exits.kinds import CLASSES, Value, differs
from de3.exits.reading import Answer, read
from de3.exits.rule import ExitRule
from de3.exits.signals import Edr, Entropy, ModelTraits, signal_of


@pytest.mark.parametrize(("tau", "lam"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.5, -1), (0.5, 101)])
def test_a_rule_out_of_range_is_refused(tau: float, lam: float) -> None:
    with pytest.raises(ValueError, match="must be in"):
        ExitRule(tau, signal_of("edr", lam))


def test_below_is_strict() -> None:
    score = Edr(1.0).score([read(0, [2.0, 0.0], [0.2, 0.5])])
    assert score is not None
    assert not ExitRule(score, Edr(1.0)).exits(score)
    assert ExitRule(np.nextafter(score, 1), Edr(1.0)).exits(score)


@given(st.data(), st.integers(2, 9), st.sampled_from([0.0, 0.5, 1.0, 30.0]))
def test_a_reading_is_what_the_signals_say(data: st.DataObject, classes: int, lam: float) -> None:
    floats = st.lists(st.floats(-50, 50, width=32), min_size=classes, max_size=classes)
    logits = data.draw(floats)
    distances = data.draw(st.lists(st.floats(-(2**-20), 2, width=32), min_size=classes, max_size=classes))
    r, signal = read(0, logits, distances), signal_of("edr", lam)
    assert r.label == np.argmax(logits)
    np.testing.assert_allclose(r.probs, formulas.softmax(logits), rtol=1e-12)
    entropy, ratio = formulas.entropy(formulas.softmax(logits)), formulas.distance_ratio(logits, distances)
    assert r.entropy == pytest.approx(float(entropy), abs=1e-12)
    assert r.distance_ratio == pytest.approx(float(ratio), abs=1e-12)
    # Computed from the reading's entropy and ratio, because near zero a harmonic mean magnifies rounding errors.
    assert signal.score([r]) == pytest.approx(
        float(formulas.edr(r.entropy, r.distance_ratio, lam)), abs=1e-12
    )
    assert signal.score([read(0, logits, None)]) == (r.entropy if lam == 0 else None)


def test_ties_go_to_the_lowest_index() -> None:
    assert read(0, [1.0, 1.0], None).label == 0
    assert read(0, [0.0, 1.0, 0.0], [0.2, 0.4, 0.9]).distance_ratio == pytest.approx(0.75)


def test_distances_that_rounding_put_outside_their_range_are_its_ends() -> None:
    assert read(0, [1.0, 0.0], [2.5, 1.0]).distance_ratio == 0.75
    assert read(0, [0.0, 1.0], [2.5, -0.5]).distance_ratio == 0


def test_logits_that_are_not_numbers_never_exit_early() -> None:
    for signal in (Entropy(), Edr(1.0)):
        assert not ExitRule(1, signal).exits(signal.score([read(0, [float("nan"), 0.0], [0.1, 0.2])]))


def test_lambda_may_be_as_large_as_its_limit_and_only_edr_has_one() -> None:
    assert signal_of("edr", 100).lam == 100
    risky = ModelTraits(risk=((0.0,) * 5, None))
    assert signal_of("risk", None, risky).lam is signal_of("entropy", 0, risky).lam is None
    for name, lam in (("risk", 0), ("risk", 1), ("entropy", 1)):
        with pytest.raises(ValueError, match="lambda"):
            signal_of(name, lam, risky)


@pytest.mark.parametrize(
    ("one", "other", "tolerance", "unlike"),
    [
        (1.0, 1.5, 0.5, False),
        (1.0, 1.5, 0.25, True),
        (1.0, math.nan, 0.5, True),
        (1.0, "good", 0.5, True),
        (1, 1, None, False),
        (1, 2, None, True),
        ([1, 2], [1], None, True),
    ],
)
def test_answers_differ_in_the_class_in_any_label_or_beyond_the_tolerance(
    one: Answer, other: Answer, tolerance: float | None, unlike: bool
) -> None:
    kind = CLASSES if tolerance is None else Value(tolerance)
    assert differs(kind, one, other) == differs(kind, other, one) == unlike
