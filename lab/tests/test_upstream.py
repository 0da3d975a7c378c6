"""The accounting of a stream through a server with an upstream."""

from pathlib import Path

import numpy as np
import pytest

from lab.upstream import STOPPED, Answer, Plan, checkpoint_table, ends_of, permuted, result_of, stopped, table

COUNT, SWITCH = 2000, 1000


def test_the_numbers_of_a_stream() -> None:
    plan = Plan([f"text {i}" for i in range(COUNT + 1)], Path("stock"), "encoder", switch=SWITCH)
    truth = ["a" if i < SWITCH else "b" for i in range(COUNT + 1)]
    # The first half: 600 texts of the upstream, 6 of them noise; then local answers, the last 8 of which are wrong.
    answers = [Answer(i, "b" if i < 6 else "a", "upstream", 6) for i in range(600)]
    answers += [Answer(i, "a" if i < SWITCH - 8 else "b", "threshold", 3) for i in range(600, SWITCH)]
    # After the switch: 20 local answers of the old model, then the upstream, which once gives none.
    answers += [Answer(i, "a", "threshold", 3) for i in range(SWITCH, SWITCH + 20)]
    answers += [Answer(i, "b", "upstream", 6) for i in range(SWITCH + 20, COUNT)]
    answers.append(Answer(COUNT, None))
    calls = {"learning": 600, "uncertain": 980, "audit": 20, "repeat": 5, "retry": 15}
    report = {"calls": calls, "failures": {"rate_limited": 15, "reply": 5}, "cost": 1.605}
    result = result_of(plan, answers, truth, report)
    result.switch = SWITCH
    none = dict.fromkeys(calls, 0)
    result.checkpoints = [
        (SWITCH, none | {"learning": 600}),
        (1800, none | {"learning": 1400}),
        (COUNT, calls),
    ]
    numbers = result.numbers()
    assert numbers["texts"] == COUNT and numbers["unanswered"] == 1
    assert (numbers["calls"], numbers["calls_share"], numbers["calls_last_tenth"]) == (1620, 0.81, 1.1)
    assert (numbers["local"], numbers["local_last_tenth"], numbers["first_local"]) == (420 / COUNT, 0.0, 600)
    assert numbers["noise"] == 6 / 1580, "the upstream's own answers do not differ"
    assert numbers["differ"] == 28 / COUNT and numbers["differ_local"] == pytest.approx(28 / 420)
    assert numbers["differ_last_half"] == 20 / 1000 == numbers["differ_after_switch"]
    assert numbers["worst_after_500"] == pytest.approx(28 / (SWITCH + 20))
    assert numbers["full_cost"] == pytest.approx(0.001 * (COUNT + 1)), "a failed call without a reply is free"
    assert (numbers["local_before_switch"], numbers["differ_before_switch"]) == (1.0, 8 / SWITCH)
    assert numbers["stopped_after"] == 20
    # 20 of the latest 500 differ, and 10 may: the first 10 must have left the window.
    assert numbers["within_again_after"] == 9 + 500
    columns, rows = table([result, result])
    assert all(len(row) == len(columns) == 3 for row in rows)
    columns, rows = checkpoint_table(result)
    assert all(len(row) == len(columns) for row in rows)
    assert [row[0] for row in rows] == [str(SWITCH), "1800", str(COUNT)]
    assert rows[0][-2:] == ["40.00%", "0.80%"]


def test_the_end_of_local_answers() -> None:
    assert stopped(np.array([True, False] * STOPPED)) is None
    assert stopped(np.array([False] * (STOPPED - 1))) is None
    assert stopped(np.array([False, True] * 3 + [False] * STOPPED)) == 6


def test_a_switch_permutes_some_labels_and_is_a_checkpoint() -> None:
    assert permuted(2) == [1, 0]
    order = permuted(10)
    assert sorted(order) == list(range(10)) and sum(a != b for a, b in enumerate(order)) == 3
    assert ends_of(1000, 0) == list(range(100, 1001, 100))
    assert ends_of(1000, 250)[:4] == [100, 200, 250, 300]
