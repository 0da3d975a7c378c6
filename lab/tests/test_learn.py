"""The numbers that the studies of learning compute."""

import numpy as np
import pytest

from de3.exits.calibration import FINE_TAUS
from lab.learn import WINDOW, Answer, Story, _measure, table
from lab.studies.learn import SIZES, Version, stream

G = len(np.unique(FINE_TAUS))


def version(rates: np.ndarray) -> Version:
    """A version whose answers never differ on the texts of a stream, which exit at layer 1 at every τ above 0.

    rates: its supposed true rate of disagreement at each τ, (taus,).
    """
    layers = np.ones((50, G), np.int64)
    layers[:, 0] = 6
    return Version(np.zeros((50, G), np.bool_), layers, 200, rates)


def test_a_stream_is_broken_once_a_tau_is_reached_whose_true_rate_is_above_the_promise() -> None:
    above = np.ones(G)
    above[0] = 0
    is_broken, layers = stream([version(above)] * len(SIZES), 0.02, 1)
    assert is_broken
    is_broken, layers = stream([version(np.zeros(G))] * len(SIZES), 0.02, 1)
    assert not is_broken and 1 <= layers < 2


def test_the_numbers_of_a_story() -> None:
    first = [Answer(6, "a", 3.0)] * 600 + [Answer(2, "a", 1.0)] * 600
    then = [Answer(6, "a", 3.0)] * WINDOW + [Answer(3, "b", 1.5)] * 20 + [Answer(6, "a", 3.0)] * WINDOW
    answers = first + then
    story = Story(0.02, len(first))
    _measure(story, answers, ["a"] * len(answers), len(first), audits_ms=600.0)
    assert story.first_early == 600
    assert story.speedup == 3.0
    assert story.model_speedup == pytest.approx(3.0 * 1200 / (600 * 3 + 600))
    assert story.with_audits == pytest.approx(3.0 * 1200 / (600 * 3 + 600 + 600))
    assert story.disagreement == pytest.approx((20 / len(answers), 0.0, 20 / len(then)))
    # The rate of the latest WINDOW texts is above 2% while they include at least 11 of the 20.
    assert story.recovery == WINDOW + 9 + WINDOW
    columns, rows = table([story, story])
    assert len(rows) == 3 and all(len(row) == len(columns) for row in rows)
