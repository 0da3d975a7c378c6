"""Risk: the regression at its optimum and in degenerate cases; no text is scored by a risk that was fitted on it."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.exits import risk
from de3.exits.reading import read
from de3.exits.recorded import Recorded
from de3.exits.signals import Risk
from tests.test_calibration import recorded


def features(n: int, seed: int) -> np.ndarray:
    """n rows of features, (n, 5): a constant, and four features with different means and spreads."""
    rng = np.random.default_rng(seed)
    return np.hstack([np.ones((n, 1)), rng.normal([3, -1, 0, 20], [0.5, 2, 1, 8], (n, 4))])


def gradient(x: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Gradient of the loss of `regress`, reimplemented, with respect to the weights of standardized features."""
    mean, spread = x[:, 1:].mean(0), x[:, 1:].std(0)
    inside = np.array([weights[0] + weights[1:] @ mean, *(weights[1:] * spread)])
    error = 1 / (1 + np.exp(-x @ weights)) - targets
    by_feature = [error.sum(), *(((x[:, 1:] - mean) / spread).T @ error)]
    return np.array(by_feature) + np.array([1e-3, *[0.01] * 4]) * inside


@settings(max_examples=40)
@given(
    st.integers(2, 60), st.integers(0, 10**6), st.sampled_from(["separable", "none", "all", "one", "chance"])
)
def test_weights_are_finite_and_optimal_whatever_the_targets(n: int, seed: int, kind: str) -> None:
    x = features(n, seed)
    targets = {
        "separable": x[:, 1] > np.median(x[:, 1]),
        "none": np.zeros(n, bool),
        "all": np.ones(n, bool),
        "one": np.arange(n) == 0,
        "chance": np.random.default_rng(seed).random(n) < 0.5,
    }[kind].astype(float)
    found = risk.regress(x, targets)
    assert np.isfinite(found).all() and np.abs(found).max() < 1e4
    # With so few rows, a feature may hardly vary; it then gets no weight.
    varies = x.std(0) > risk.MIN_SPREAD * (1 + np.abs(x.mean(0)))
    varies[0] = True
    assert (found[~varies] == 0).all()
    assert np.abs(gradient(x, targets, found)[varies]).max() < 1e-5
    p = 1 / (1 + np.exp(-x @ found))
    if kind in ("none", "all"):
        assert np.abs(p - targets).max() < 0.1


def test_a_feature_that_hardly_varies_for_its_size_gets_no_weight() -> None:
    x = features(500, 1)
    x[:, 4] = -27.6 + 1e-3 * np.random.default_rng(0).normal(size=500)
    targets = (x[:, 1] > 3).astype(float)
    found = risk.regress(x, targets)
    assert found[4] == 0 and found[:4] == pytest.approx(risk.regress(x[:, :4], targets), rel=1e-6)


@pytest.mark.parametrize(("n", "groups"), [(200, 40), (31, 3), (20, 1)])
def test_no_fit_scores_a_group_that_it_saw(n: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = np.random.default_rng(0).integers(0, groups, n)
    r = recorded(n)
    number = {row.tobytes(): i for i, exits in enumerate(r.risk_features) for row in exits}
    scored, seen = list[int](), list[set[int]]()

    fit = risk._Exit.fit

    def spy(self: Any) -> Any:
        seen.append({number[row.tobytes()] for row in self.features})
        return fit(self)

    def probabilities(self: Any, weights: Any) -> Any:
        rows = [number[row.tobytes()] for row in self.features]
        assert seen[-1] and not set(group[list(seen[-1])].tolist()) & set(group[rows].tolist())
        scored.extend(rows)
        return np.zeros(len(rows))

    monkeypatch.setattr(risk._Exit, "fit", spy)
    monkeypatch.setattr(risk._Exit, "probabilities", probabilities)
    scores = risk.cross_fit(r, group)
    if len(set(group.tolist())) == 1:  # there is no other group to fit it on
        assert scored == [] and np.isnan(scores).all()
    else:
        assert sorted(scored) == sorted(2 * list(range(n))) and not scores[:, :2].any()  # at two exits


def test_scores_of_any_size_are_probabilities_or_nan() -> None:
    signal = Risk(((1e6, 1e6, 0.0, 0.0, 0.0), (-1e6, -1e6, 0.0, 0.0, 0.0), None))
    readings = [read(layer, [80.0, -80.0], None) for layer in range(2)]
    assert signal.score(readings[:1]) == pytest.approx(1)
    assert 0 < (signal.score(readings) or 0) < 1e-300
    assert math.isnan(signal.score([read(0, [math.nan, 0.0], None)]) or 0)


@pytest.mark.parametrize(("n", "of_a_group", "weighs"), [(600, 1, True), (600, 30, False), (40, 1, False)])
def test_the_state_is_weighed_only_if_it_helps_on_other_groups(n: int, of_a_group: int, weighs: bool) -> None:
    """Not if it only tells the groups apart, or if few samples differ."""
    rng = np.random.default_rng(1)
    groups = np.arange(n) // of_a_group
    states = rng.normal(size=(n, 8)).astype(np.float32)[groups]
    differs = (states[:, 0] > 1) if of_a_group == 1 else (rng.random(n) < 0.4)[groups]
    logits = np.zeros((n, 2, 2), np.float32)
    logits[:, 0, 0], logits[:, 1, 1] = 1, np.where(differs, 2, -2)
    r = Recorded([0, 1], logits, np.full_like(logits, np.nan), np.zeros(n, np.int64), states=lambda _: states)
    fitted = risk.fit(r, groups)
    assert len(fitted.weights[0] or ()) == (13 if weighs else 5)
    rows = rng.permutation(n)
    parts = [r.rows(rows[: n // 2]), r.rows(rows[n // 2 :])]
    assert np.allclose(fitted.scores(Recorded.joined(parts))[:, 0], fitted.scores(r)[rows, 0])
    for scores in (fitted.scores(r), risk.cross_fit(r, groups)):
        assert (scores[differs, 0].mean() > 2 * scores[~differs, 0].mean()) == weighs


def test_each_exit_is_fitted_to_its_own_disagreement() -> None:
    """This holds even if only some layers have exits."""
    r = replace(recorded(500), exit_layers=[1, 4, 6])
    fitted = risk.fit(r)
    differs = r.differs.astype(float)
    assert len(fitted.weights) == 7 and [m for m, w in enumerate(fitted.weights) if w is not None] == [1, 4]
    for j, layer in enumerate((1, 4)):
        expected = risk.regress(r.risk_features[:, j], differs[:, j])
        assert fitted.weights[layer] == tuple(expected.tolist())


@pytest.mark.parametrize(("margin", "distance"), [(1.0, 0.5), (25.0, 1e-11), (60.0, 0.0), (1.0, math.nan)])
def test_an_exit_has_the_risk_of_its_formula_alone_and_in_arrays(margin: float, distance: float) -> None:
    """Both computations take the logarithm of max(value, 1e-12)."""
    has_prototypes = not math.isnan(distance)
    signal = Risk(((1.0, 0.1, 0.5, 0.2, 0.1 if has_prototypes else 0.0), None))
    logits = np.array([margin, 0.0, -9.0], np.float32)
    distances = np.array([distance, 1.0, 2.0] if has_prototypes else [math.nan] * 3, np.float32)
    reading = read(0, logits.tolist(), distances.tolist() if has_prototypes else None)
    h, ratio = max(reading.entropy, 1e-12), max(float(distances[0]) / 2, 1e-12)
    z = 1 + 0.1 * margin + 0.5 * reading.entropy + 0.2 * math.log(h)
    z += 0.1 * math.log(ratio) if has_prototypes else 0.0
    exits = np.stack([[logits] * 2]), np.stack([[distances] * 2])
    scores = signal.scores(Recorded([0, 1], *exits, np.zeros(1, np.int64)))
    for score in (signal.score([reading]), scores[0, 0]):
        assert score == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-4)
    last = read(1, logits.tolist(), None)
    assert signal.score([reading, last]) is None and math.isnan(scores[0, 1])
