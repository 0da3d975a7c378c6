"""A bounded queue between the event loop and the engine threads, with fair scheduling between clients."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from threading import Condition, RLock

from de3.runtime.engine.job import Item, Job
from de3.runtime.engine.served import MAX_STEP_S
from de3.runtime.errors import RequestError
from de3.runtime.fair_queue import Client, FairQueue

MAX_GROUP = 16
MAX_STRETCH = 3  # limit on the time of a text that joins a group, relative to that of the first text
MAX_SHADOWS = 64
# A text is preempted by another client's text if its own client has received this much more engine time.
PREEMPTION_LEAD_S = 0.002
MAX_HERE_CHARS = 2048  # of the texts that an event loop runs in one step, as tokenizing them blocks it
RECENT_S = 1.0  # a client counts as active for this long after its last text was enqueued or ran

Entry = tuple[float, int, Item]  # due, order of arrival, item


class WorkQueue:
    """A queue of at most `limit` pending items, from which the engine threads take their work.

    Items with an admitted deadline are scheduled first, in the order of their deadlines. After them, the client that
    has received the least engine time is served next (see FairQueue). A pass that several models share is charged once
    for each of them.

    Items of dropped jobs are skipped. Shadow items are scheduled only when nothing else is pending, and are discarded
    when the queue is closed. Neither kind counts toward the limit or the length.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._admitted: list[Entry] = []  # a heap
        # By client: number and predicted seconds of the pending items whose deadline is admitted.
        self._num_admitted, self._admitted_s = Counter[str](), defaultdict[str, float](float)
        self._fair = FairQueue(self._drops)  # the items without an admitted deadline
        self._shadows: deque[Item] = deque()
        self._pending = 0  # items of jobs that are not dropped
        self._pending_admitted = 0  # pending items whose deadline is admitted
        self._stored = 0  # pending items, and items of dropped jobs that are still in a heap
        self._waiting = 0  # threads that wait for items
        self._is_here = False  # the event loop runs items
        self._closed = False
        # Entered itself, in C: that of a condition is entered in Python. A condition is only waited for and notified.
        self._lock = RLock()
        self._changed, self._emptied = Condition(self._lock), Condition(self._lock)

    def __len__(self) -> int:
        return self._pending

    def put(self, job: Job, wakes: bool = True) -> None:
        """Enqueue all items of a job, or none: raises RequestError if the queue has no room or is closed.

        wakes: wake threads that wait; false if next_here() follows.
        """
        with self._lock:
            room = self.shadow_room if job.is_shadow else self.limit - self._pending
            if self._closed or len(job.items) > room:
                reason = "the server is stopping" if self._closed else "the queue is full"
                raise RequestError(f"{reason}; try again", cause="queue_full", retry_after_s=1)
            for item in job.items:
                self._add(item)
            if wakes:
                self._changed.notify(len(job.items))

    def requeue(self, *items: Item) -> None:
        """Requeue preempted items, all at once. They have been accepted, so the limit does not apply."""
        if not items:
            return
        with self._lock:
            for item in items:
                if item.job.is_dropped or (item.job.is_shadow and self._closed):
                    continue
                if item.job.is_shadow:
                    self._shadows.appendleft(item)
                else:
                    self._add(item)
            if not self._is_here:
                self._changed.notify(len(items))

    def next(self, threads: int = 1) -> list[Item]:
        """Wait for the most urgent item; returns an empty list once the queue is closed and empty.

        If many items are pending, returns a group: the most urgent item, and the next ones of the same encoder with the
        same next layer, as long as they fit into a step, are not much longer than the first, and leave enough items
        for the other engine threads. threads: number of engine threads.
        """
        with self._lock:
            while self._is_here or (heap := self._first()) is None:
                if self._closed and not self._is_here:
                    return []
                if self._is_here or not self._shadows:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
                elif not (shadow := self._shadows.popleft()).job.is_dropped:
                    return [shadow]
            share = -(-self._pending // threads)
            items = [self._take(heap)]
            if self._pending:
                self._fill(items, share)
            return items

    def next_here(self, threads: int) -> list[Item]:
        """The most urgent items for the event loop to run itself, if they are short and all threads wait.

        Otherwise an empty list, and a thread takes them. After the items, leave_here() must be called: until then the
        threads wait.
        """
        with self._lock:
            if self._waiting < threads or (heap := self._first()) is None:
                return []
            first = heap[0][2]
            if not first.can_share or first.text.chars > MAX_HERE_CHARS:
                self._changed.notify()
                return []
            self._is_here = True
            items = [self._take(heap)]
            if self._pending:
                self._fill(items, MAX_GROUP, MAX_HERE_CHARS - first.text.chars)
            return items

    def leave_here(self) -> bool:
        """The event loop has run its items; returns True if others are pending, for which next_here() must follow."""
        with self._lock:
            self._is_here = False
            if self._closed or self._shadows:
                self._changed.notify_all()
            return self._pending > 0

    def join(self, items: list[Item], threads: int = 1) -> None:
        """Add pending items to a group between two steps, by the same rules as next()."""
        if not self._pending:
            return
        with self._lock:
            self._fill(items, len(items) + -(-self._pending // threads))

    def _fill(self, items: list[Item], room: int, chars: float = inf) -> None:
        first = items[0]
        left = MAX_STEP_S - sum(item.group_s for item in items)
        while first.can_share and len(items) < min(room, MAX_GROUP) and (heap := self._first()) is not None:
            item = heap[0][2]
            left -= item.group_s
            chars -= item.text.chars
            # In a group each text waits for all others, so a text much longer than the first does not join.
            fits = left >= 0 and chars >= 0 and item.group_s <= MAX_STRETCH * first.group_s
            is_alike = item.layer == first.layer and item.shared.encoder is first.shared.encoder
            if not (fits and is_alike and item.can_share):
                break
            items.append(self._take(heap))

    @property
    def shadow_room(self) -> int:
        """Number of further shadow items for which there is room."""
        return MAX_SHADOWS - len(self._shadows)

    def drop_shadows(self) -> None:
        """Drop the pending shadow items."""
        with self._lock:
            for item in self._shadows:
                item.job.is_dropped = True
            self._shadows.clear()

    def charge(self, spent: Sequence[tuple[Item, float]]) -> None:
        """Charge engine time, in seconds, to the clients of items; shadow jobs are not charged."""
        with self._lock:
            for item, seconds in spent:
                if not item.job.is_shadow:
                    self._charge(item, seconds)
                    self._fair.note(item.job.client)

    def lead(self, job: Job) -> float:
        """Lead of a job's client over other clients in engine time, seconds.

        The lead is the client's admitted time, plus the engine time that it has received in excess of the pending
        client with the least. It is negative if no other client was active within RECENT_S.
        """
        with self._lock:
            if self._fair.is_alone(job.client, RECENT_S):
                return -1.0
            client = self._fair.client(job.client)
            others = [c.spent for _, _, c in self._fair.listed if c is not client and c.items]
            lead_s = max(0.0, client.spent - min(others)) if others else 0.0
            return self._admitted_s.get(job.client, 0.0) + lead_s

    def has_more_urgent_than(self, item: Item, seconds: float = 0.0) -> bool:
        """True if a pending item preempts this one; first charges this item's client `seconds` more of engine time.

        Any item but a shadow item preempts a shadow item. An item with an admitted deadline preempts items without one
        or with a later one. If neither item has an admitted deadline, an item of the same client preempts if it is due
        earlier, and an item of another client if that client has received less engine time by more than
        PREEMPTION_LEAD_S.
        """
        with self._lock:
            own = None
            if not item.job.is_shadow:
                own = self._charge(item, seconds)
            heap = self._first()
            if heap is None:
                return False
            if own is None:
                return True
            due, _, first = heap[0]
            if item.job.is_admitted or first.job.is_admitted:
                return first.job.is_admitted and not (item.job.is_admitted and item.due <= due)
            other = self._fair.clients[first.job.client]
            return due < item.due if other is own else other.spent + PREEMPTION_LEAD_S < own.spent

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until no items other than shadow items are pending, for at most this many seconds."""
        with self._lock:
            self._emptied.wait_for(lambda: not self._pending, seconds)

    def later_than(self, due: float) -> int:
        """Number of pending items that are due after this time (perf_counter seconds)."""
        with self._lock:
            heaps = [self._admitted, *(client.items for _, _, client in self._fair.listed)]
            return sum(when > due and not item.job.is_dropped for heap in heaps for when, _, item in heap)

    def drop(self, job: Job) -> None:
        """Drop a job: its pending items no longer count toward the limit, and never run."""
        with self._lock:
            job.is_dropped = True
            self._forget(job)
            if self._stored > 2 * self._pending + MAX_GROUP:  # most are dropped: free their texts
                for heap in (self._admitted, *(client.items for client in self._fair.clients.values())):
                    heap[:] = [entry for entry in heap if not entry[2].job.is_dropped]
                    heapify(heap)
                self._stored = self._pending

    def close(self) -> None:
        """Reject new jobs; pending items are still scheduled, except shadow items."""
        with self._lock:
            self._closed = True
            self._shadows.clear()
            self._changed.notify_all()

    def _first(self) -> list[Entry] | None:
        """The heap whose first item is the most urgent; None if no items other than shadow items are pending.

        Removes items of dropped jobs from the top of the heaps.
        """
        return (self._admitted and self._fair.clean(self._admitted)) or self._fair.first()

    def _drops(self, item: Item) -> bool:
        """True if the item's job was dropped; the item then no longer counts."""
        if item.job.is_dropped:
            self._forget(item.job)
            self._stored -= 1
        return item.job.is_dropped

    def _charge(self, item: Item, seconds: float) -> Client[Item]:
        """Charge an item's client for a pass, once for each model that shares it."""
        client = self._fair.client(item.job.client)
        client.spent += seconds * len(item.heads)
        return client

    def _take(self, heap: list[Entry]) -> Item:
        item = heappop(heap)[2]
        # A client that is served out of turn, for an admitted deadline, advances the virtual time only if all pending
        # items are admitted.
        if self._pending == self._pending_admitted or not item.job.is_admitted:
            self._fair.serves(self._fair.client(item.job.client))
        if item.job.is_admitted:
            self._pending_admitted -= 1
            item.job.admitted_s -= item.predicted_s
            self._release(item.job.client, 1, item.predicted_s)
        item.job.pending -= 1
        self._pending -= 1
        self._stored -= 1
        if not self._pending:
            self._emptied.notify_all()
        return item

    def _add(self, item: Item) -> None:
        if item.job.is_shadow:
            self._shadows.append(item)
            return
        client = item.job.client
        self._fair.note(client)
        if item.job.is_admitted:
            heappush(self._admitted, (item.due, next(self._fair.order), item))
            self._pending_admitted += 1
            item.job.admitted_s += item.predicted_s
            self._admitted_s[client] += item.predicted_s
            self._num_admitted[client] += 1
        else:
            self._fair.add(client, item, item.due)
        item.job.pending += 1
        self._pending += 1
        self._stored += 1

    def _forget(self, job: Job) -> None:
        self._pending -= job.pending
        if not self._pending:
            self._emptied.notify_all()
        if job.is_admitted and job.pending:
            self._pending_admitted -= job.pending
            self._release(job.client, job.pending, job.admitted_s)
            job.admitted_s = 0.0
        job.pending = 0

    def _release(self, name: str, items: int, seconds: float) -> None:
        self._num_admitted[name] -= items
        self._admitted_s[name] -= seconds
        if not self._num_admitted[name]:  # rounding may keep the sum from returning to 0
            del self._num_admitted[name], self._admitted_s[name]
