"""The decisions in the studies of drift and shift, on small arrays."""

import numpy as np
import pytest

from de3.exits.recorded import Recorded
from de3.exits.risk import fit
from lab.experiments.drift import (
    AWAY,
    Arm,
    Guard,
    Start,
    Stream,
    Texts,
    run,
    slide,
    stream,
)

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
