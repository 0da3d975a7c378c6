"""The decisions in the studies of drift and shift, on small arrays."""

from dataclasses import replace

import numpy as np
import pytest

from de3.exits.calibration import FINE_TAUS
from de3.exits.recorded import Recorded
from de3.exits.risk import fit
from de3.exits.rule import exit_index
from lab.experiments.drift import (
    AWAY,
    Arm,
    Guard,
    Start,
    Stream,
    Texts,
    pseudo_labels,
    run,
    slide,
    stream,
)
from lab.experiments.shift import at, guaranteed, tau_within

TAU = 0.4


def recorded(n: int = 400, seed: int = 0) -> Recorded:
    """Texts with two classes and exits at layers 0 to 2; the first exit is wrong most often, mostly if uncertain."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    sign = np.where(labels, 1.0, -1.0)
    gaps = sign[:, None] * np.array([1.0, 2.0, 8.0]) + rng.normal(0, 1, (n, 3))
    logits = np.stack([-gaps / 2, gaps / 2], -1).astype(np.float32)
    distances = np.full((n, 3, 2), np.nan, np.float32)
    return Recorded([0, 1, 2], logits, distances, labels)


def texts(n: int = 400, turned: float = 0.0) -> Texts:
    """Embeddings on the unit circle, one class at 0° and one at 90°, all rotated by `turned` radians."""
    r = recorded(n)
    rng = np.random.default_rng(1)
    angles = np.where(r.answers[:, -1], np.pi / 2, 0.0)[:, None] + rng.normal(0, 0.2, (n, 2)) + turned
    return Texts(np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32), r)


def start(of: Texts, gamma: float = 0.1) -> Start:
    prototypes = np.tile(np.eye(2, dtype=np.float32), (2, 1, 1))
    return Start(prototypes, fit(of.rows(np.arange(len(of.embedded)), prototypes)), TAU, gamma)


def in_turn(n: int = 400, measured: int = 200, audited: float = 0.2) -> Stream:
    return Stream(np.arange(n), np.random.default_rng(2).random(n) < audited, measured)


def test_a_step_moves_each_prototype_by_the_texts_of_its_class_that_passed_its_exit() -> None:
    prototypes = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]], np.float32)
    embedded = np.array([[[0, 2], [0, 4]], [[0, 4], [0, 8]], [[5, 5], [5, 5]]], np.float32)
    labels = np.array([0, 0, 0])
    passed = np.array([[True, True], [True, False], [False, False]])
    moved = slide(prototypes, embedded, labels, passed, 0.1)
    np.testing.assert_allclose(moved[0, 0], [0.9, 0.3])  # toward the mean of the first two texts
    np.testing.assert_allclose(moved[1, 0], [0.9, 0.4])  # toward the first text alone
    np.testing.assert_array_equal(moved[:, 1], prototypes[:, 1])
    assert prototypes[0, 0, 0] == 1  # the initial ones are unchanged


def test_pseudo_labels_are_full_depths_where_known_and_else_those_of_sure_exits() -> None:
    logits = np.array([[[2, 0], [0, 2]]] * 4, np.float32)  # the first exit says 0, full depth 1
    r = Recorded([0, 1], logits, np.full((4, 2, 2), np.nan, np.float32), np.zeros(4, int))
    scores = np.array([[0.1, np.nan], [0.3, np.nan], [0.9, np.nan], [0.3, np.nan]])
    audited = np.array([False, False, False, True])
    labels, use = pseudo_labels(r, scores, exit_index(scores, TAU), TAU, audited)
    assert labels.tolist() == [0, 0, 1, 1]
    assert use.tolist() == [True, False, True, True]


def test_the_guard_fires_on_harm_only_and_not_before_it_has_seen_enough() -> None:
    right, wrong = np.array([True, True]), np.array([True, False])
    guard = Guard()
    for _ in range(Guard.LEAST - 1):
        guard.add(wrong, right)
    assert not guard.has_fired
    guard.add(wrong, right)
    assert guard.has_fired
    unharmed = Guard()
    for _ in range(500):
        unharmed.add(right, wrong)
        unharmed.add(wrong, wrong)
    assert not unharmed.has_fired


def test_a_stream_measures_each_text_once_and_none_that_came_before() -> None:
    home, away = np.arange(300), np.arange(900)  # the other domain contains the texts of home, and others
    s = stream(home, away, 3)
    before, last = s.order[: s.measured], s.order[s.measured :]
    assert len(set(last)) == len(last) == 450
    assert not set(before) & set(last)
    assert len(before) == len(set(home) - set(last)) + AWAY
    assert 0.04 < s.audited.mean() < 0.06
    assert set(stream(home, away, 4).order[-450:]) != set(last)


def test_an_arm_that_adapts_nothing_is_the_rule_on_the_measured_texts() -> None:
    of = texts()
    begin, order = start(of), in_turn()
    r = of.rows(order.order[order.measured :], begin.prototypes)
    expected = at(begin.risk.scores(r), r, TAU)
    result = run(of, order, begin, Arm())
    assert (result["speedup"], result["disagreement"]) == (expected["speedup"], expected["disagreement"])
    assert result["fired"] == 0


def test_a_refitted_risk_is_that_of_the_first_audits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.experiments.drift.AUDITS", 30)
    of, order = texts(), in_turn()
    begin = start(of)
    begin = replace(
        begin, risk=replace(begin.risk, weights=((-9.0, 0, 0, 0, 0),) * 2 + (None,))
    )  # certain of everything
    audits = order.order[order.audited][:30]
    fitted = fit(of.rows(audits, begin.prototypes))
    r = of.rows(order.order[order.measured :], begin.prototypes)
    result = run(of, order, begin, Arm(refit=True))
    assert result["disagreement"] == at(fitted.scores(r), r, TAU)["disagreement"]
    assert result["disagreement"] < run(of, order, begin, Arm())["disagreement"]


def test_a_guard_that_fires_goes_back_to_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    of, order = texts(), in_turn(measured=300)
    begin = start(of, gamma=0.9)

    def reversed_labels(r: Recorded, scores: object, index: object, tau: float, audited: object) -> object:
        return 1 - r.answers[:, -1], np.ones(len(r.labels), bool)

    monkeypatch.setattr("lab.experiments.drift.pseudo_labels", reversed_labels)
    frozen, guarded, bare = (
        run(of, order, begin, arm) for arm in (Arm(), Arm(follow=True), Arm(follow=True, guarded=False))
    )
    assert guarded == {**frozen, "fired": 1.0}
    assert bare["auroc"] < frozen["auroc"] and bare["fired"] == 0


def test_the_guarantee_takes_back_a_tau_that_breaks_it() -> None:
    r = recorded(2_000)
    scores = r.entropy
    begin = int(np.searchsorted(FINE_TAUS, tau_within(scores, r, 0.06)))
    disagreement, depth, tau = guaranteed(scores, r, begin, 20_000, 0)
    frozen = at(scores, r, FINE_TAUS[begin])
    assert frozen["disagreement"] > 0.05 and disagreement < 0.03 and tau < FINE_TAUS[begin]
    assert 2 / frozen["speedup"] < depth < 2
