"""The queue: most urgent first, nothing lost or run twice, never above its limit, dropped jobs forgotten."""

import gc
from threading import Thread
from time import perf_counter
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from de3.runtime.engine.engine import MAX_LEAD_S, Engine
from de3.runtime.engine.job import Item, Job
from de3.runtime.engine.queue import MAX_GROUP, MAX_SHADOWS, MAX_STRETCH, PREEMPTION_LEAD_S, WorkQueue
from de3.runtime.engine.served import MAX_STEP_S
from de3.runtime.errors import RequestError
from de3.runtime.fair_queue import FairQueue
from tests import jobs

LIMIT = 7
MODELS = [jobs.stand_in(True) for _ in range(2)]
MODELS.append(jobs.stand_in(True, MODELS[0].encoder))


def job(texts: int, submitted: float = 0.0, seconds: float = 1.0, **fields: Any) -> Job:
    """A job whose texts are predicted to take `seconds` each; the other arguments are those of `jobs.job`."""
    return jobs.job(list(map(str, range(texts))), [seconds] * texts, submitted=submitted, **fields)


def admitted(deadline: float, client: str = "", texts: int = 1, **fields: Any) -> Job:
    new = job(texts, client=client, **fields)
    new.deadline = deadline
    new.admit()
    return new


class QueueMachine(RuleBasedStateMachine):
    """Compares the queue with its simplest model: a list that is searched for the items that may be next."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = WorkQueue(LIMIT)
        self.waiting: list[Any] = []  # items in the order of arrival
        self.running: list[Any] = []
        self.shadows: list[Any] = []
        self.spent: dict[str, float] = {}
        self.floor = 0.0  # virtual time

    def client(self, name: str) -> float:
        """The time that a client has spent; a new one begins at the virtual time."""
        return self.spent.setdefault(name, self.floor)

    def add(self, item: Any) -> None:
        name = item.job.client
        if not item.job.is_admitted:
            others = [x for x in self.waiting if x.job.client == name and not x.job.is_admitted]
            self.spent[name] = max(self.client(name), 0.0 if others else self.floor)
        self.waiting.append(item)

    def next(self) -> list[Any]:
        """The items that may be next: several if clients have spent the same time."""
        if urgent := [item for item in self.waiting if item.job.is_admitted]:
            return [min(urgent, key=lambda item: item.due)]  # ties go to the first to arrive
        least = min((self.spent[item.job.client] for item in self.waiting), default=0.0)
        names = {item.job.client for item in self.waiting if self.spent[item.job.client] == least}
        of_each = ([item for item in self.waiting if item.job.client == name] for name in names)
        return [min(items, key=lambda item: item.due) for items in of_each]

    def joins(self, group: list[Any], item: Any) -> bool:
        first = group[0]
        total = sum(x.group_s for x in [*group, item])
        fits = total <= MAX_STEP_S and item.group_s <= MAX_STRETCH * first.group_s
        is_alike = item.layer == first.layer and item.shared.encoder is first.shared.encoder
        return first.can_share and item.can_share and fits and is_alike

    def check(self, group: list[Any], known: int, room: float) -> None:
        """Check that the items of a group that are new belong there, and that no other does."""
        for i, item in enumerate(group[known:], known):
            assert item in self.next()
            assert i == 0 or (self.joins(group[:i], item) and i < room)
            if not item.job.is_admitted or all(x.job.is_admitted for x in self.waiting):
                self.floor = max(self.floor, self.client(item.job.client))
            self.waiting.remove(item)
        if self.waiting and len(group) < room:
            assert not all(self.joins(group, item) for item in self.next())

    @rule(texts=st.integers(1, MAX_SHADOWS))
    def put_shadow(self, texts: int) -> None:
        new = job(texts, is_shadow=True)
        if len(self.shadows) + texts > MAX_SHADOWS:
            with pytest.raises(RequestError, match="the queue is full"):
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
        assert self.queue.has_more_urgent_than(item)  # any request preempts a shadow
        self.queue.requeue(item)
        assert self.queue.next(2) == other.items and self.queue.next(2) == [item]

    @rule(
        texts=st.integers(1, LIMIT + 1),
        client=st.sampled_from("abc"),
        submitted=st.integers(0, 5),
        deadline=st.none() | st.integers(0, 50),
        seconds=st.sampled_from([0.125, 1, 9]),  # their sums are exact: rounding would matter at the limit
        model=st.sampled_from(MODELS),
        share=st.sampled_from([0.125, 0.25, 0.125 * MAX_STRETCH, 0.5, 2]),
    )
    def put(self, deadline: int | None, share: float, **fields: Any) -> None:
        new = job(**fields, group_s=share * MAX_STEP_S)
        if deadline is not None:
            new = admitted(deadline, **fields, group_s=share * MAX_STEP_S)
        if len(self.waiting) + len(new.items) > LIMIT:
            with pytest.raises(RequestError, match="the queue is full"):
                self.queue.put(new)
        else:
            self.queue.put(new)
            for item in new.items:
                self.add(item)

    @precondition(lambda self: self.waiting)
    @rule(threads=st.integers(1, 3), later=st.integers(1, 3))
    def take(self, threads: int, later: int) -> None:
        """Take a group, which runs a layer, and is then joined by others."""
        room = len(self.waiting) / threads
        group = self.queue.next(threads)
        self.check(group, 0, room)
        for item in group:
            item.layer += 1
        known, room = len(group), len(group) + len(self.waiting) / later
        self.queue.join(group, later)
        self.check(group, known, room)
        self.running += group

    @precondition(lambda self: self.waiting)
    @rule(threads=st.sampled_from([0, 0, 0, 1]), chars=st.sampled_from([0, 1, 3, 2048]))
    def take_here(self, threads: int, chars: int) -> None:
        """The event loop takes short texts, if all threads wait, of which there are none here; it runs a layer."""
        with mock.patch("de3.runtime.engine.queue.MAX_HERE_CHARS", chars):
            group = self.queue.next_here(threads)
        if not group:
            assert threads or not chars or not all(item.can_share for item in self.next())
            return
        assert not threads and sum(item.text.chars for item in group) <= chars
        self.check(group, 0, min(chars, MAX_GROUP))
        assert self.queue.leave_here() == bool(self.waiting)
        for item in group:
            item.layer += 1
        self.running += group

    @precondition(lambda self: self.running)
    @rule(data=st.data(), seconds=st.sampled_from([0, 0.25, 1, 4]), is_back=st.booleans())
    def run(self, data: st.DataObject, seconds: float, is_back: bool) -> None:
        item = data.draw(st.sampled_from(self.running))
        name = item.job.client
        own = self.spent[name] = self.client(name) + seconds
        is_preempted = {
            (first.job.is_admitted and first.due < item.due)
            if item.job.is_admitted
            else first.job.is_admitted
            or (first.due < item.due if first.job.client == name else self.spent[first.job.client] < own)
            for first in self.next()
        }
        assert self.queue.has_more_urgent_than(item, seconds) in (is_preempted or {False})
        self.running.remove(item)
        if is_back:
            self.queue.requeue(item)
            if not item.job.is_dropped:
                self.add(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), fails=st.booleans())
    def drop(self, data: st.DataObject, fails: bool) -> None:
        """If an item of a running job fails, the engine marks the job as dropped, so its other items never run."""
        gone = data.draw(st.sampled_from(self.waiting)).job
        gone.is_dropped = fails
        self.queue.drop(gone)
        self.queue.drop(gone)  # dropping it again changes nothing
        self.waiting = [item for item in self.waiting if item.job is not gone]

    @invariant()
    def it_counts_what_waits(self) -> None:
        assert len(self.queue) == len(self.waiting)
        for due in (0.5, 3):
            assert self.queue.later_than(due) == sum(item.due > due for item in self.waiting)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=50)


def test_a_client_ahead_of_others_that_wait_gets_no_admitted() -> None:
    engine = Engine(1, 100)
    engine.submit(job(1, client="patient"))
    engine.queue.charge([(job(1, client="greedy").items[0], 2 * MAX_LEAD_S)])
    asking = job(1, client="greedy")
    asking.deadline = perf_counter() + 100
    with pytest.raises(RequestError, match="over your share"):
        engine.submit(asking)
    engine.queue.next()
    engine.submit(asking)  # no other client is waiting
    assert asking.is_admitted


def test_a_refused_job_reserves_no_time() -> None:
    engine = Engine(1, 1)
    engine.submit(job(1))
    first, second = (job(1, perf_counter(), first_exit_s=[60.0], budget_s=100.0) for _ in range(2))
    with pytest.raises(RequestError, match="the queue is full"):
        engine.submit(first)
    assert engine.deadlines.admit(second) == 0


def test_shadows_can_be_dropped() -> None:
    """This happens when models are unloaded or the server stops. A shadow that is running then is not requeued."""
    queue = WorkQueue(10)
    queue.put(shadow := job(3, is_shadow=True))
    item = queue.next()[0]
    queue.drop_shadows()
    assert shadow.is_dropped and queue.shadow_room == MAX_SHADOWS
    queue.requeue(item)
    queue.put(failed := job(2, is_shadow=True))
    failed.is_dropped = True
    queue.put(last := job(2, is_shadow=True))
    assert queue.next() == last.items[:1]
    queue.put(real := job(1))
    queue.close()
    queue.requeue(last.items[0])
    with pytest.raises(RequestError, match="the server is stopping"):
        queue.put(job(1))
    assert (queue.next(), queue.next()) == (real.items, [])


def test_audits_wait_until_nothing_is_pending() -> None:
    """Items are pending until they are scheduled or dropped."""
    queue = WorkQueue(10)
    for end in (queue.next, lambda: queue.drop(request)):
        queue.put(request := job(1))
        waiting = Thread(target=queue.wait_until_empty, args=(60,))
        waiting.start()
        waiting.join(0.01)
        assert waiting.is_alive()
        end()
        waiting.join(20)
        assert not waiting.is_alive()
    queue.put(job(1, is_shadow=True))
    queue.wait_until_empty(60)  # shadow jobs are not requests
    queue.put(job(1))
    queue.wait_until_empty(0.01)  # returns after the timeout


def test_a_group_has_a_largest_size() -> None:
    queue = WorkQueue(100)
    queue.put(job(2 * MAX_GROUP, group_s=MAX_STEP_S / 1000))
    group = queue.next(threads=8)
    assert len(group) == 2 * MAX_GROUP // 8
    queue.join(group)
    assert len(group) == MAX_GROUP == len(queue.next())


def test_only_another_recently_active_client_limits_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("de3.runtime.fair_queue.perf_counter", lambda: now)
    queue, asking = WorkQueue(100), job(1, client="asking")
    queue.charge([(asking.items[0], 5.0)])
    assert queue.lead(asking) < 0  # its own activity does not count
    queue.put(admitted(200.0, "asking"))  # a text of 1 s
    queue.put(gone := admitted(300.0, "asking", texts=2, seconds=3.0))
    queue.put(job(1, client="other"))
    assert queue.lead(asking) == 1.0 + 2 * 3.0 + 5.0
    queue.drop(gone)
    queue.drop(queue.next()[0].job)
    assert queue.lead(asking) == 5.0
    now += 1.001
    queue.charge([(asking.items[0], 1.0)])
    assert queue.lead(asking) < 0


def test_a_client_is_preempted_once_it_leads_by_enough() -> None:
    """A pass that several models share is charged once for each of them."""
    for models in (1, 3):
        queue = WorkQueue(100)
        queue.put(job(1, client="running", others=[job(1) for _ in range(models - 1)]))
        (item,) = queue.next()
        queue.put(job(1, client="waiting"))
        assert not queue.has_more_urgent_than(item, 0.75 * PREEMPTION_LEAD_S / models)
        assert queue.has_more_urgent_than(item, 0.5 * PREEMPTION_LEAD_S / models)
        waiting = job(1, client="waiting").items[0]
        queue.charge([(waiting, 1.25 * PREEMPTION_LEAD_S)])  # so that both lead alike
        assert not queue.has_more_urgent_than(item, 0.75 * PREEMPTION_LEAD_S / models)


def test_texts_of_dropped_jobs_are_freed() -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Item) for one in gc.get_objects())

    queue, before = WorkQueue(100), alive()
    queue.put(job(1, submitted=-1.0))  # due first, so the others are not at the top of a heap
    for deadline in (None, 5.0):
        for _ in range(4 * MAX_GROUP):
            gone = job(1) if deadline is None else admitted(deadline)
            queue.put(gone)
            queue.drop(gone)
    assert alive() <= before + 2 * MAX_GROUP


def test_half_of_the_idle_clients_are_forgotten_and_no_pending_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("de3.runtime.fair_queue.MAX_CLIENTS", 10)
    fair = FairQueue[str](lambda _: False)
    fair.add("pending", "an item")
    for number in range(1, 10):
        fair.client(str(number)).spent = float(number)
    assert fair.client("new").spent == 5.0  # new ones have no lead over those that were forgotten
    assert set(fair.clients) == {"pending", "6", "7", "8", "9", "new"}


def test_shadows_are_charged_to_no_client() -> None:
    queue = WorkQueue(100)
    queue.charge([(job(1, client="a", is_shadow=True).items[0], 5.0)])
    queue.put(job(1, submitted=1.0, client="b"))
    queue.put(job(1, submitted=2.0, client="a"))
    queue.charge([(job(1, client="b").items[0], 1.0)])
    assert queue.next()[0].job.client == "a"


@pytest.mark.parametrize("in_turn", [True, False])
def test_a_client_that_was_idle_or_is_new_has_saved_up_no_time(in_turn: bool) -> None:
    """Whether the other one was served in its turn, or for a deadline while nothing else was pending."""
    queue, idle, busy = WorkQueue(100), job(1, client="idle"), job(3, client="busy")
    if in_turn:
        queue.charge([(idle.items[0], 0.0)])
    queue.put(busy)
    for _ in range(1 + in_turn):
        queue.charge([(queue.next()[0], 5.0)])
    if not in_turn:
        queue.drop(busy)  # its other items are still in a heap
        queue.put(admitted(0, "busy"))
        queue.next()
        queue.put(busy := job(1, client="busy"))
    queue.put(idle)
    queue.charge([(idle.items[0], 6.0 if in_turn else 1.0)])  # as it starts at the time of the other one, 5 s
    assert queue.next() == busy.items[-1:]
