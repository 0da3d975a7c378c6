"""The queue: nothing lost, nothing run twice, never above its limit; dropped jobs cost no room."""

import asyncio
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from exits.rule import ExitRule
from server.protocol import Text
from server.queue import QueueFullError, WorkQueue
from server.work import Job

LIMIT = 7
LOOP = asyncio.new_event_loop()


def job(texts: int) -> Job:
    future: Any = asyncio.Future(loop=LOOP)
    return Job(None, ExitRule(0, 1), True, [Text(str(i)) for i in range(texts)], future)  # type: ignore[arg-type]


class QueueMachine(RuleBasedStateMachine):
    """The queue against the plainest model of it: a list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WorkQueue(LIMIT)
        self.waiting: list[Any] = []

    @rule(texts=st.integers(1, LIMIT + 1))
    def put(self, texts: int) -> None:
        new = job(texts)
        if len(self.waiting) + texts > LIMIT:
            with pytest.raises(QueueFullError):
                self.queue.put(new)
        else:
            self.queue.put(new)
            self.waiting += new.items

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self) -> None:
        assert self.queue.next() is self.waiting.pop(0)

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


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(1, 4))
def test_closing_hands_out_what_was_accepted_once(sizes: list[int], threads: int) -> None:
    queue = WorkQueue(100)
    jobs = [job(n) for n in sizes]
    taken: list[Any] = []

    def work() -> None:
        while item := queue.next():
            taken.append(item)

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
