"""The bounded queue between the event loop and the engine threads."""

from collections import deque
from heapq import heapify, heappop, heappush
from itertools import count
from threading import Condition

from server.work import Item, Job

MAX_TOGETHER = 16
MAX_SHADOWS = 64


class QueueFullError(Exception):
    """The queue has no room for these items."""


class WorkQueue:
    """Items by urgency, the one that is due first first, at most `limit` waiting.

    Dropped jobs cost nothing and no room. Shadows' items are handed out only when nothing else waits; they
    take nobody's room, count in no number here, and go when the queue is closed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: list[tuple[float, int, Item]] = []  # a heap
        self._shadows: deque[Item] = deque()
        self._order = count()  # items that are due at the same time go first come, first served
        self._waiting = 0  # items of jobs that are not dropped
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
        """Let an item that was handed out wait once more. It was accepted, so the limit does not count."""
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
            while (first := self._peek()) is None:
                if self._closed:
                    return []
                if not self._shadows:
                    self._changed.wait()
                elif not (shadow := self._shadows.popleft()).job.dropped:
                    return [shadow]
            room = min(MAX_TOGETHER, -(-self._waiting // threads)) if first.layer == 0 else 1
            found, left = [self._take()], first.job.together_s - first.predicted
            while len(found) < room and (item := self._peek()) is not None:
                left -= item.predicted
                if left < 0 or item.layer > 0 or item.job.model is not first.job.model:
                    break
                if not item.job.together_s:
                    break
                found.append(self._take())
            return found

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

    def _peek(self) -> Item | None:
        """The most urgent item, which _take takes; those of dropped jobs before it fall away."""
        while self._items and self._items[0][2].job.dropped:
            self._forget(heappop(self._items)[2].job)
        return self._items[0][2] if self._items else None

    def _take(self) -> Item:
        item = heappop(self._items)[2]
        item.job.waiting -= 1
        self._waiting -= 1
        return item

    def later_than(self, due: float) -> int:
        """How many of those that wait are due after then."""
        with self._changed:
            return sum(when > due and not item.job.dropped for when, _, item in self._items)

    def has_more_urgent_than(self, item: Item) -> bool:
        """Whether something that waits is due before this item; all is that is no shadow, if this is one."""
        with self._changed:
            first = self._peek()
            return first is not None and (item.job.is_shadow or first.due < item.due)

    def drop(self, job: Job) -> None:
        """Give a job up: its waiting items free their room at once and never run."""
        with self._changed:
            job.dropped = True
            self._forget(job)
            if len(self._items) > 2 * self._waiting + MAX_TOGETHER:  # mostly dropped: let go of their texts
                self._items = [entry for entry in self._items if not entry[2].job.dropped]
                heapify(self._items)

    def _add(self, item: Item) -> None:
        if item.job.is_shadow:
            self._shadows.append(item)
            return
        heappush(self._items, (item.due, next(self._order), item))
        item.job.waiting += 1
        self._waiting += 1

    def _forget(self, job: Job) -> None:
        self._waiting -= job.waiting
        job.waiting = 0

    def close(self) -> None:
        """Accept nothing more; what waits is still handed out, but for shadows."""
        with self._changed:
            self._closed = True
            self._shadows.clear()
            self._changed.notify_all()
