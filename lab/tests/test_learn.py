"""The numbers that the studies of learning compute."""

import pytest

from lab.learn import WINDOW, Answer, Story, _measure, table


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
