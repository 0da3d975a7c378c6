"""Deadlines: which may still be promised, and how long each text may take so that every promise is kept.

Texts with a deadline run before all others, the earliest deadline first. A promise is given only if, by the
times measured at start-up, every promised text reaches its first exit in time; what time is left beyond that
is shared out as texts begin.
"""

from dataclasses import dataclass
from heapq import heapify, heapreplace
from threading import Lock
from time import perf_counter

from server.work import Item, Job


@dataclass(slots=True)
class _Promise:
    """What a job still has to begin.

    Attributes:
        firsts: seconds to the first exit of each text that has not begun, by its index.
        first_s: their sum.
        predicted_s: seconds of these texts through every layer.
    """

    deadline: float
    firsts: dict[int, float]
    first_s: float
    predicted_s: float


class Deadlines:
    """The promises that hold, and until when each engine thread is held by what it runs."""

    def __init__(self, threads: int) -> None:
        self._promises: dict[Job, _Promise] = {}
        self._free_at = [0.0] * threads  # perf_counter seconds
        self._lock = Lock()

    def held(self, thread: int, until: float) -> None:
        """A thread is likely to be busy until then."""
        self._free_at[thread] = until

    def promise(self, job: Job) -> float:
        """Promise a job's deadline if that can be kept, with all promised before; else the seconds it would
        take, and nothing is promised.

        A job with best_effort then gets the first deadline that can be, and leaves at its first exits.
        """
        assert job.deadline is not None
        now = perf_counter()
        firsts = {item.index: item.first_s for item in job.items}
        new = _Promise(job.deadline, firsts, sum(firsts.values()), sum(item.predicted for item in job.items))
        with self._lock:
            needed = self._needed(new, now)
            if needed and not job.best_effort:
                return needed
            if needed:
                last = max((p.deadline for p in self._promises.values()), default=0.0)
                job.deadline = new.deadline = max(job.deadline, last, now + needed)
                job.is_late = True
            self._promises[job] = new
        return 0.0

    def _needed(self, new: _Promise, now: float) -> float:
        """0 if all promises can be kept, else about how many seconds the new one should ask for.

        Plays the queue through: the most urgent text goes to the thread that is free first.
        """
        free = [max(now, t) for t in self._free_at]
        heapify(free)
        for promise in sorted([*self._promises.values(), new], key=lambda p: p.deadline):
            end = now
            for first in promise.firsts.values():
                start = free[0]
                heapreplace(free, start + first)
                end = max(end, start + first)
            if end > promise.deadline:
                if promise is new:
                    return end - now
                if promise.deadline >= new.deadline and end - new.first_s <= promise.deadline:
                    return promise.deadline - now + new.first_s  # it would be late for the new one's sake
        return 0.0

    def begin(self, item: Item, thread: int) -> float:
        """When a text that begins now must leave at the latest; its thread is held until then.

        Beyond its first exit it gets, of the time that no promise needs, the part that it has in the work
        that waits.
        """
        now, job = perf_counter(), item.job
        with self._lock:
            own = self._promises.get(job)
            if own is None:  # dropped meanwhile
                return now
            own.firsts.pop(item.index)
            own.first_s -= item.first_s
            own.predicted_s -= item.predicted
            extra, first_s, predicted_s, longest = float("inf"), item.first_s, item.predicted, 0.0
            for promise in sorted(self._promises.values(), key=lambda p: p.deadline):
                first_s += promise.first_s
                predicted_s += promise.predicted_s
                longest = max(longest, max(promise.firsts.values(), default=0.0))
                if promise.deadline >= own.deadline:
                    left = sum(
                        max(0.0, promise.deadline - max(now, 0.0 if i == thread else t))
                        for i, t in enumerate(self._free_at)
                    )
                    # Handing out texts to n threads wastes at most n − 1 of the longest (Graham's bound).
                    spare = left - first_s - (len(self._free_at) - 1) * longest
                    extra = min(extra, spare * item.predicted / max(predicted_s, 1e-9))
            if not own.firsts:
                del self._promises[job]
            ends = now if job.is_late else min(own.deadline, now + item.first_s + max(0.0, extra))
            self._free_at[thread] = max(ends, now + item.first_s)
            return ends

    def drop(self, job: Job) -> None:
        """Forget a job that was given up."""
        with self._lock:
            self._promises.pop(job, None)
