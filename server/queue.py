"""The bounded queue between the event loop and the engine threads."""

from collections import deque
from threading import Condition

from server.work import Item, Job


class QueueFullError(Exception):
    """The queue has no room for these items."""


class WorkQueue:
    """Items first come, first served, at most `limit` waiting. Dropped jobs cost nothing and no room."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: deque[Item] = deque()
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
            self._items.extend(job.items)
            job.waiting = len(job.items)
            self._waiting += job.waiting
            self._changed.notify(len(job.items))

    def next(self) -> Item | None:
        """Wait for the next item; None once the queue is closed and empty."""
        with self._changed:
            while True:
                while self._items:
                    item = self._items.popleft()
                    if item.job.dropped:
                        self._forget(item.job)
                        continue
                    item.job.waiting -= 1
                    self._waiting -= 1
                    return item
                if self._closed:
                    return None
                self._changed.wait()

    def drop(self, job: Job) -> None:
        """Give a job up: its waiting items free their room at once and never run."""
        with self._changed:
            job.dropped = True
            self._forget(job)

    def _forget(self, job: Job) -> None:
        self._waiting -= job.waiting
        job.waiting = 0

    def close(self) -> None:
        """Accept nothing more; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
