"""The decisions in the studies of drift and shift, on small arrays."""

import numpy as np

from lab.experiments.drift import AWAY, Guard, slide, stream


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
