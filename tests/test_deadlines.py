"""Accepted deadlines, simulated with a fake clock: every one is met, whatever else arrives."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from de3.runtime.engine.deadlines import Deadlines
from de3.runtime.engine.job import REPLY_S, REPLY_TEXT_S, Item, Job
from tests import jobs

THREADS, LAYERS = 2, 6


class Clock:
    """A fake perf_counter for runtime.engine.deadlines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("de3.runtime.engine.deadlines.perf_counter", lambda: self.now)


def job(clock: Clock, firsts: list[float], budget_s: float, best_effort: bool = False) -> Job:
    """A job with one text for each entry of `firsts`.

    firsts: predicted seconds to the first exit of each text; full depth takes LAYERS times as long.
    """
    return jobs.job(
        [str(i) for i in range(len(firsts))],
        [LAYERS * first for first in firsts],
        first_exit_s=firsts,
        budget_s=budget_s,
        best_effort=best_effort,
        submitted=clock.now,
    )


times = st.floats(0.001, 0.02)
asked = st.tuples(
    st.floats(0, 0.05),  # seconds after the previous job
    st.lists(times, min_size=1, max_size=8),
    st.floats(0.001, 0.3),
)


@settings(max_examples=100)
@given(
    asked_jobs=st.lists(asked, min_size=1, max_size=12),
    uses=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    others=st.lists(st.floats(0, 0.03), max_size=20),
)
def test_every_admitted_deadline_is_met(
    asked_jobs: list[tuple[float, list[float], float]], uses: list[float], others: list[float]
) -> None:
    """A text stops between its first exit and the time that begin() allows; work without a deadline fills the gaps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        deadlines = Deadlines(THREADS)
        arrivals, at = [], clock.now
        for gap, firsts, budget_s in asked_jobs:
            at += gap
            arrivals.append((at, firsts, budget_s))
        arrivals.reverse()
        free = [clock.now] * THREADS
        waiting: list[tuple[float, int, Item]] = []
        kept, order, spent = [], 0, 0
        while arrivals or waiting:
            thread = min(range(THREADS), key=free.__getitem__)
            if arrivals and arrivals[-1][0] <= free[thread]:
                clock.now, firsts, budget_s = arrivals.pop()
                new = job(clock, firsts, budget_s)
                if needed := deadlines.admit(new):
                    last = max(*free, *(deadline for deadline, _, _ in waiting))
                    while needed:  # a larger budget may be in the way of a later job
                        assert budget_s < needed + REPLY_S + REPLY_TEXT_S * len(firsts) + 1e-9
                        assert needed <= last - clock.now + sum(firsts) + 1e-9
                        budget_s = needed + REPLY_S + REPLY_TEXT_S * len(firsts) + 1e-6
                        needed = deadlines.admit(again := job(clock, firsts, budget_s))
                    deadlines.drop(again)
                    continue
                for item in new.items:
                    heapq.heappush(waiting, (new.deadline or 0.0, order, item))
                    order += 1
                continue
            clock.now = free[thread]
            if waiting:
                _, _, item = heapq.heappop(waiting)
                ends = deadlines.begin(item, thread)
                may = max(item.first_exit_s, ends - clock.now)
                use = uses[spent % len(uses)]
                spent += 1
                free[thread] = clock.now + item.first_exit_s + use * (may - item.first_exit_s)
                if free[thread] < max(ends, clock.now + item.first_exit_s):
                    # It exited early: the engine reports this at once, because the thread is free then.
                    deadlines.occupy(thread, free[thread])
                kept.append((free[thread], item.job.deadline))
            else:
                held = others.pop() if others else 0.0
                free[thread] += held or max(1e-6, arrivals[-1][0] - free[thread])
                deadlines.occupy(thread, free[thread] if held else 0.0)
        assert all(end <= (deadline or 0.0) + 1e-9 for end, deadline in kept)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_text_alone_gets_the_whole_budget_and_a_batch_shares_it(clock: Clock) -> None:
    deadlines = Deadlines(THREADS)
    alone = job(clock, [0.01], 0.1)
    assert deadlines.admit(alone) == 0
    assert deadlines.begin(alone.items[0], 0) == pytest.approx(alone.deadline)
    deadlines.occupy(0, 0.0)
    many = job(clock, [0.01] * 4, 0.1)
    assert deadlines.admit(many) == 0
    left = (many.deadline or 0.0) - clock.now
    assert left == pytest.approx(0.1 - REPLY_S - 4 * REPLY_TEXT_S)
    part = deadlines.begin(many.items[0], 0) - clock.now
    assert 0.8 * left / 2 < part <= left / 2 + 1e-9


def test_best_effort_takes_nothing_from_an_admitted_job(clock: Clock) -> None:
    deadlines = Deadlines(THREADS)
    first = job(clock, [0.01] * 10, 0.055)
    late = job(clock, [0.01], 0.001, best_effort=True)
    assert deadlines.admit(first) == 0
    assert first.deadline is not None
    needed = deadlines.admit(job(clock, [0.01], 0.03))
    assert needed == pytest.approx(first.deadline - clock.now + 0.01)
    assert deadlines.admit(late) == 0
    assert late.is_late and not first.is_late
    assert late.deadline is not None and late.deadline >= first.deadline
    assert deadlines.begin(late.items[0], 0) == clock.now  # it must stop at its first exit


def test_a_missed_deadline_does_not_block_later_jobs(clock: Clock) -> None:
    """A layer has taken longer than was measured; the new job is not the cause."""
    deadlines = Deadlines(1)
    assert deadlines.admit(job(clock, [0.05] * 5, 0.3)) == 0
    deadlines.occupy(0, clock.now + 0.2)
    assert deadlines.admit(job(clock, [0.01], 0.25)) == 0


def test_a_text_that_begins_takes_only_its_own_thread_and_time(clock: Clock) -> None:
    deadlines = Deadlines(1)
    alone = job(clock, [0.01], 5.0)
    assert deadlines.admit(alone) == 0
    deadlines.occupy(0, clock.now + 0.05)  # for earlier work, which has ended
    assert deadlines.begin(alone.items[0], 0) == pytest.approx(alone.deadline)
    deadlines.occupy(0, 0.0)  # the text has exited, and reserves nothing
    late = job(clock, [0.05], 0.001, best_effort=True)
    assert deadlines.admit(late) == 0 and late.deadline == pytest.approx(clock.now + 0.05)
    assert deadlines.begin(late.items[0], 0) == clock.now
    assert deadlines.admit(job(clock, [0.01], 0.04)) == pytest.approx(
        0.06
    )  # after the first exit of the late one
