"""The bounded queue between the event loop and the engine threads."""

from heapq import heappop, heappush
from itertools import count
from threading import Condition

from server.work import Item, Job


class QueueFullError(Exception):
    """The queue has no room for these items."""


class WorkQueue:
    """Items by urgency, the one that is due first first, at most `limit` waiting.

    Dropped jobs cost nothing and no room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: list[tuple[float, int, Item]] = []  # a heap
        self._order = count()  # items that are due at the same time go first come, first served
        self._waiting = 0  # items of jobs that are not dropped
        self._closed = False
        self._changed = Condition()

    def __len__(self) -> int:
        return self._waiting

    def put(self, job: Job) -> None:
        """Add all items of a job, or none: raises QueueFullError."""
        with self._changed:
            if self._closed or self._waiting + len(job.items) > self.limit:
                raise QueueFullError
            for item in job.items:
                self._add(item)
            self._changed.notify(len(job.items))

    def put_back(self, item: Item) -> None:
        """Let an item that was handed out wait once more. It was accepted, so the limit does not count."""
        with self._changed:
            if not item.job.dropped:
                self._add(item)
                self._changed.notify()

    def next(self) -> Item | None:
        """Wait for the most urgent item; None once the queue is closed and empty."""
        with self._changed:
            while True:
                while self._items:
                    item = heappop(self._items)[2]
                    if item.job.dropped:
                        self._forget(item.job)
                        continue
                    item.job.waiting -= 1
                    self._waiting -= 1
                    return item
                if self._closed:
                    return None
                self._changed.wait()

    def has_more_urgent_than(self, item: Item) -> bool:
        """Whether something that waits is due before this item."""
        with self._changed:
            return bool(self._items) and self._items[0][0] < item.due

    def drop(self, job: Job) -> None:
        """Give a job up: its waiting items free their room at once and never run."""
        with self._changed:
            job.dropped = True
            self._forget(job)

    def _add(self, item: Item) -> None:
        heappush(self._items, (item.due, next(self._order), item))
        item.job.waiting += 1
        self._waiting += 1

    def _forget(self, job: Job) -> None:
        self._waiting -= job.waiting
        job.waiting = 0

    def close(self) -> None:
        """Accept nothing more; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
