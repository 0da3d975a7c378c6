"""The queue: most urgent first, nothing lost or run twice, never above its limit, dropped jobs forgotten."""

import asyncio
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exits.rule import ExitRule
from server.protocol import Text
from server.queue import MAX_SHADOWS, QueueFullError, WorkQueue
from server.work import Job

LIMIT = 7
LOOP = asyncio.new_event_loop()


def job(
    texts: int,
    submitted: float = 0.0,
    seconds: float = 1.0,
    together_s: float = 0.0,
    model: Any = None,
    is_shadow: bool = False,
) -> Job:
    """A job whose texts are predicted to take `seconds` each."""
    future: Any = asyncio.Future(loop=LOOP)
    rule, names = ExitRule(0, 1), [Text(str(i)) for i in range(texts)]
    return Job(
        *(model, rule, True, False, False, names, lambda _: seconds, future, together_s),
        submitted=submitted,
        is_shadow=is_shadow,
    )


class QueueMachine(RuleBasedStateMachine):
    """The queue against the plainest model of it: a list, searched for what is due first."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WorkQueue(LIMIT)
        self.waiting: list[Any] = []  # items in the order in which they came
        self.running: list[Any] = []
        self.shadows: list[Any] = []

    @rule(texts=st.integers(1, MAX_SHADOWS))
    def put_shadow(self, texts: int) -> None:
        new = job(texts, is_shadow=True)
        if len(self.shadows) + texts > MAX_SHADOWS:
            with pytest.raises(QueueFullError):
                self.queue.put(new)
        else:
            self.queue.put(new)
            self.shadows += new.items

    @precondition(lambda self: self.shadows and not self.waiting)
    @rule()
    def take_shadow(self) -> None:
        item = self.shadows.pop(0)
        assert self.queue.next(2) == [item]
        assert not self.queue.has_more_urgent_than(item)
        self.queue.put(other := job(1, submitted=99))
        assert self.queue.has_more_urgent_than(item)  # anything is
        self.queue.put_back(item)
        assert self.queue.next(2) == other.items and self.queue.next(2) == [item]

    @rule(
        texts=st.integers(1, LIMIT + 1),
        submitted=st.integers(0, 5),
        seconds=st.sampled_from([0.125, 1, 9]),  # exact sums: rounding would decide at the limit
        model=st.sampled_from(["a", "b"]),
    )
    def put(self, texts: int, submitted: int, seconds: float, model: str) -> None:
        new = job(texts, submitted, seconds, 2.5, model)
        if len(self.waiting) + texts > LIMIT:
            with pytest.raises(QueueFullError):
                self.queue.put(new)
        else:
            self.queue.put(new)
            self.waiting += new.items

    @precondition(lambda self: self.waiting)
    @rule(threads=st.integers(1, 3))
    def take(self, threads: int) -> None:
        first, *others = sorted(self.waiting, key=lambda item: item.due)  # of equals the first that came
        expected = [first]
        for item in others if first.layer == 0 else []:
            total = sum(x.predicted for x in [*expected, item])
            fits = total <= 2.5 and item.layer == 0 and item.job.model == first.job.model
            if not fits or len(expected) >= len(self.waiting) / threads:
                break
            expected.append(item)
        assert self.queue.next(threads) == expected
        for item in expected:
            self.waiting.remove(item)
            item.layer += 1
            self.running.append(item)

    @precondition(lambda self: self.running and len(self.waiting) < LIMIT)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.running))
        urgent = self.queue.has_more_urgent_than(item)
        assert urgent or not any(other.due < item.due for other in self.waiting)
        self.running.remove(item)
        self.queue.put_back(item)
        if not item.job.dropped:
            self.waiting.append(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting)).job
        self.queue.drop(gone)
        self.queue.drop(gone)  # a second time changes nothing
        self.waiting = [item for item in self.waiting if item.job is not gone]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """An item of a job that runs fails: its others stay in the queue, but are never handed out."""
        gone = data.draw(st.sampled_from(self.waiting)).job
        gone.dropped = True
        self.queue.drop(gone)
        self.waiting = [item for item in self.waiting if item.job is not gone]

    @invariant()
    def it_counts_what_waits(self) -> None:
        assert len(self.queue) == len(self.waiting) <= LIMIT


TestQueue = QueueMachine.TestCase


def test_short_texts_overtake_a_long_one_but_not_for_ever() -> None:
    queue = WorkQueue(100)
    long = job(1, submitted=0.0, seconds=1.0)
    queue.put(long)
    for k in range(20):  # one short text every 0.1 s
        queue.put(job(1, submitted=k / 10, seconds=0.05))
    order = [queue.next()[0] for _ in range(21)]
    assert order.index(long.items[0]) == 10  # those that came within its own time went first


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(1, 4))
def test_closing_hands_out_what_was_accepted_once(sizes: list[int], threads: int) -> None:
    queue = WorkQueue(100)
    jobs = [job(n, together_s=3.0) for n in sizes]
    taken: list[Any] = []

    def work() -> None:
        while items := queue.next(threads):
            taken.extend(items)

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for j in jobs:
        queue.put(j)
    queue.close()
    for worker in workers:
        worker.join(10)
    assert sorted(map(id, taken)) == sorted(id(item) for j in jobs for item in j.items)
    with pytest.raises(QueueFullError):
        queue.put(job(1))


def test_shadows_can_be_dropped() -> None:
    """As their models go; and one that runs does not come back."""
    queue = WorkQueue(10)
    queue.put(shadow := job(3, is_shadow=True))
    item = queue.next()[0]
    queue.drop_shadows()
    assert shadow.future.cancelled() and queue.shadow_room == MAX_SHADOWS
    queue.put_back(item)
    queue.put(failed := job(2, is_shadow=True))
    failed.dropped = True
    queue.put(last := job(1, is_shadow=True))
    assert queue.next() == last.items


def test_shadows_go_when_the_queue_is_closed() -> None:
    queue = WorkQueue(10)
    shadow, real = job(3, is_shadow=True), job(1)
    queue.put(shadow)
    item = queue.next()[0]
    queue.put(real)
    queue.close()
    queue.put_back(item)
    assert (queue.next(), queue.next()) == (real.items, [])


def test_short_texts_come_together_within_their_limits() -> None:
    queue = WorkQueue(100)
    for n, seconds in ((3, 1.0), (4, 1.0), (1, 9.0)):
        queue.put(job(n, seconds=seconds, together_s=4.0))
    assert len(queue.next(threads=4)) == 2  # its share of the 8 that wait
    assert len(queue.next(threads=1)) == 4  # 4 s of them
    assert [len(queue.next(threads=1)) for _ in range(2)] == [1, 1]  # the last is too long to share
    started = job(3, together_s=4.0)
    queue.put(started)
    item = queue.next(threads=3)[0]
    item.layer = 2
    queue.put_back(item)
    assert queue.next(threads=1) == [item]  # what has started goes on alone
