"""The bounded queue between the event loop and the engine threads, which serves clients fairly."""

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from threading import Condition
from time import perf_counter

from server.work import Item, Job

MAX_TOGETHER = 16
MAX_SHADOWS = 64
# Seconds of engine time. A text is preempted for another client's if its own client has had this much more.
GRAIN_S = 0.002
RECENT_S = 1.0  # for which a client counts as active after it came or ran
MAX_CLIENTS = 4096  # that are remembered while they have nothing waiting

Entry = tuple[float, int, Item]  # due, order of arrival, item


class QueueFullError(Exception):
    """The queue has no room for these items."""


@dataclass(slots=True, eq=False)
class _Client:
    """A client's items by urgency, and the engine time that it has had.

    Attributes:
        spent: seconds on the queue's virtual clock: who comes, or comes back, starts with what the clients
            that are being served have had, and nothing is saved up.
        promised: seconds that what is promised and waits is predicted to take.
        items: a heap.
        is_listed: whether it is among those that may be served next.
    """

    spent: float = 0.0
    promised: float = 0.0
    items: list[Entry] = field(default_factory=list)
    is_listed: bool = False

    @property
    def is_waiting(self) -> bool:
        """Whether it has, or may have, anything in the queue."""
        return self.is_listed or self.promised > 0


class WorkQueue:
    """Items that wait for an engine thread, at most `limit` of them.

    Promised deadlines come first, the earliest before all. Then comes the client that has had the least
    engine time, and of its items the one that is due first. So a client gets its share of the engine whatever
    others send, and a client that is alone gets everything.

    Dropped jobs cost nothing and no room. Shadows' items are scheduled only when nothing else waits; they
    take nobody's room, count in no number here, and go when the queue is closed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._promised: list[Entry] = []  # a heap
        self._clients: dict[str, _Client] = {}
        # A heap, by what they had spent as of its last update.
        self._listed: list[tuple[float, int, _Client]] = []
        # The client that came or ran last and when, and the last other one.
        self._recent = (("", -RECENT_S), ("", -RECENT_S))
        self._floor = 0.0  # what the client that was served last had spent
        self._shadows: deque[Item] = deque()
        self._order = count()  # items that are due at the same time go first come, first served
        self._waiting = 0  # items of jobs that are not dropped
        self._stored = 0  # and those of dropped ones that are still in a heap
        self._closed = False
        self._changed = Condition()

    def __len__(self) -> int:
        return self._waiting

    def put(self, job: Job) -> None:
        """Add all items of a job, or none: raises QueueFullError."""
        with self._changed:
            room = self.shadow_room if job.is_shadow else self.limit - self._waiting
            if self._closed or len(job.items) > room:
                raise QueueFullError
            for item in job.items:
                self._add(item)
            self._changed.notify(len(job.items))

    def put_back(self, item: Item) -> None:
        """Let a preempted item wait once more. It was accepted, so the limit does not count."""
        with self._changed:
            if item.job.dropped or (item.job.is_shadow and self._closed):
                return
            if item.job.is_shadow:
                self._shadows.appendleft(item)
            else:
                self._add(item)
            self._changed.notify()

    def next(self, threads: int = 1) -> list[Item]:
        """Wait for the most urgent item; nothing once the queue is closed and empty.

        When many wait, others that have not started come with it: the next most urgent of the same model, as
        long as all are predicted to take no more than its `together_s` and other threads get their share.
        """
        with self._changed:
            while (heap := self._first()) is None:
                if self._closed:
                    return []
                if not self._shadows:
                    self._changed.wait()
                elif not (shadow := self._shadows.popleft()).job.dropped:
                    return [shadow]
            first = heap[0][2]
            room = min(MAX_TOGETHER, -(-self._waiting // threads))
            if first.layer > 0 or not first.is_short:
                room = 1
            items, left = [self._take(heap)], first.job.together_s - first.predicted
            while len(items) < room and (heap := self._first()) is not None:
                item = heap[0][2]
                left -= item.predicted
                if left < 0 or item.layer > 0 or item.job.model is not first.job.model:
                    break
                if not item.job.together_s or not item.is_short:
                    break
                items.append(self._take(heap))
            return items

    @property
    def shadow_room(self) -> int:
        """How many more items of shadows may wait."""
        return MAX_SHADOWS - len(self._shadows)

    def drop_shadows(self) -> None:
        """Give up the shadows that wait; called by the event loop, whose futures they have."""
        with self._changed:
            for item in self._shadows:
                item.job.dropped = True
                item.job.future.cancel()
            self._shadows.clear()

    def charge(self, job: Job, seconds: float) -> None:
        """Count engine time that a job's client has had."""
        if not job.is_shadow:
            with self._changed:
                self._client(job.client).spent += seconds
                self._note(job.client)

    def lead(self, job: Job) -> float:
        """Seconds of engine time that a job's client has had more than others who wait, and has been
        promised; less than 0 if there was nobody else for RECENT_S."""
        with self._changed:
            (name, last), (_, before) = self._recent
            if perf_counter() - (before if name == job.client else last) > RECENT_S:
                return -1.0
            client = self._client(job.client)
            others = [c.spent for _, _, c in self._listed if c is not client and c.items]
            return client.promised + (max(0.0, client.spent - min(others)) if others else 0.0)

    def has_more_urgent_than(self, item: Item, seconds: float = 0.0) -> bool:
        """Whether something waits for which this item must be preempted, after `seconds` of engine time.

        That is whatever is no shadow, if this is one; an earlier promise; where nothing is promised, an item
        of its own client that is due before it, or one of a client that has had less than its own by GRAIN_S.
        """
        with self._changed:
            own = None
            if not item.job.is_shadow:
                own = self._client(item.job.client)
                own.spent += seconds
            heap = self._first()
            if heap is None:
                return False
            if own is None:
                return True
            due, _, first = heap[0]
            if item.job.is_promised or first.job.is_promised:
                return first.job.is_promised and not (item.job.is_promised and item.due <= due)
            other = self._clients[first.job.client]
            return due < item.due if other is own else other.spent + GRAIN_S < own.spent

    def later_than(self, due: float) -> int:
        """How many of those that wait are due after then."""
        with self._changed:
            heaps = [self._promised, *(client.items for _, _, client in self._listed)]
            return sum(when > due and not item.job.dropped for heap in heaps for when, _, item in heap)

    def drop(self, job: Job) -> None:
        """Drop a job: its waiting items free their room at once and never run."""
        with self._changed:
            job.dropped = True
            self._forget(job)
            if self._stored > 2 * self._waiting + MAX_TOGETHER:  # mostly dropped: let go of their texts
                for heap in (self._promised, *(client.items for client in self._clients.values())):
                    heap[:] = [entry for entry in heap if not entry[2].job.dropped]
                    heapify(heap)
                self._stored = self._waiting

    def close(self) -> None:
        """Accept nothing more; what waits is still scheduled, but for shadows."""
        with self._changed:
            self._closed = True
            self._shadows.clear()
            self._changed.notify_all()

    def _first(self) -> list[Entry] | None:
        """The heap whose first item is the most urgent, for _take; items of dropped jobs before it fall
        away."""
        if self._clean(self._promised):
            return self._promised
        listed = self._listed
        while listed:
            spent, _, client = listed[0]
            if not self._clean(client.items):
                heappop(listed)
                client.is_listed = False
            elif spent < client.spent:
                heapreplace(listed, (client.spent, next(self._order), client))
            else:
                return client.items
        return None

    def _clean(self, heap: list[Entry]) -> list[Entry]:
        while heap and heap[0][2].job.dropped:
            self._forget(heappop(heap)[2].job)
            self._stored -= 1
        return heap

    def _take(self, heap: list[Entry]) -> Item:
        item = heappop(heap)[2]
        # A client that is served before its turn, as its deadline is promised, sets the clock only if nobody
        # waits.
        if not item.job.is_promised or self._stored == len(self._promised) + 1:
            self._floor = max(self._floor, self._client(item.job.client).spent)
        if item.job.is_promised:
            item.job.promised_s -= item.predicted
            self._client(item.job.client).promised -= item.predicted
        item.job.waiting -= 1
        self._waiting -= 1
        self._stored -= 1
        return item

    def _note(self, client: str) -> None:
        last = self._recent[0]
        self._recent = ((client, perf_counter()), self._recent[1] if client == last[0] else last)

    def _add(self, item: Item) -> None:
        if item.job.is_shadow:
            self._shadows.append(item)
            return
        entry = (item.due, next(self._order), item)
        client = self._client(item.job.client)
        self._note(item.job.client)
        if item.job.is_promised:
            heappush(self._promised, entry)
            item.job.promised_s += item.predicted
            client.promised += item.predicted
        else:
            if not self._clean(client.items):
                client.spent = max(client.spent, self._floor)
            heappush(client.items, entry)
            if not client.is_listed:
                client.is_listed = True
                heappush(self._listed, (client.spent, next(self._order), client))
        item.job.waiting += 1
        self._waiting += 1
        self._stored += 1

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            if len(self._clients) >= MAX_CLIENTS:
                self._forget_clients()
            client = self._clients[name] = _Client(self._floor)
        return client

    def _forget_clients(self) -> None:
        """Set the clock forward, for half of those that have nothing waiting: they are then as good as
        new."""
        idle = sorted(c.spent for c in self._clients.values() if not c.is_waiting)
        if idle:
            self._floor = max(self._floor, idle[len(idle) // 2])
        self._clients = {n: c for n, c in self._clients.items() if c.is_waiting or c.spent > self._floor}

    def _forget(self, job: Job) -> None:
        self._waiting -= job.waiting
        job.waiting = 0
        if job.promised_s:
            self._client(job.client).promised -= job.promised_s
            job.promised_s = 0.0
