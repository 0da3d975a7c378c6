"""Decides which deadlines can be admitted, and how long each text may take so that all of them are met.

Texts with an admitted deadline run before all others, the earliest deadline first. A deadline is admitted only if, by
the times measured during warm-up, the job's texts reach their first exits in time and make no admitted text late; the
remaining time is divided among the texts as they start.
"""

from dataclasses import dataclass
from heapq import heapify, heapreplace
from threading import Lock
from time import perf_counter

from de3.runtime.engine.job import Item, Job


@dataclass(slots=True)
class _Admitted:
    """The texts of an admitted job that have not started.

    Attributes:
        deadline: perf_counter seconds.
        firsts: predicted seconds to the first exit of each of these texts.
        first_s: sum of `firsts`.
        predicted_s: total predicted seconds of these texts through every layer.
    """

    deadline: float
    firsts: dict[Item, float]
    first_s: float
    predicted_s: float


class Deadlines:
    """The admitted jobs, and the time until which each engine thread is occupied."""

    def __init__(self, threads: int) -> None:
        self._admitted: dict[Job, _Admitted] = {}
        self._free_at = [0.0] * threads  # perf_counter seconds
        self._lock = Lock()

    def occupy(self, thread: int, until: float) -> None:
        """Record that a thread cannot be preempted before `until` (perf_counter seconds)."""
        self._free_at[thread] = until

    def admit(self, job: Job) -> float:
        """Admit a job's deadline if it can be met without making an earlier job late.

        Returns 0 if it was admitted, else the approximate seconds from now by which the job's texts could reach their
        first exits. With best_effort, a job whose deadline cannot be admitted gets a later one that can be met, after
        all earlier ones; its texts then exit at their first exits, and 0 is returned.
        """
        assert job.deadline is not None
        now = perf_counter()
        firsts = {item: item.first_exit_s for item in job.items}
        new = _Admitted(
            job.deadline, firsts, sum(firsts.values()), sum(item.predicted_s for item in job.items)
        )
        with self._lock:
            needed = self._needed(new, now)
            if needed and not job.request.options.best_effort:
                return needed
            if needed:
                last = max((p.deadline for p in self._admitted.values()), default=0.0)
                job.deadline = new.deadline = max(job.deadline, last, now + needed)
                job.is_late = True
            self._admitted[job] = new
        return 0.0

    def _needed(self, new: _Admitted, now: float) -> float:
        """0 if the new job's deadline can be met without making another job late. Otherwise, the approximate number of
        seconds from now by which it could be. Simulates the schedule: the most urgent text goes to the thread that is
        free first.
        """
        free = [max(now, t) for t in self._free_at]
        heapify(free)
        for one in sorted([*self._admitted.values(), new], key=lambda p: p.deadline):
            end = now
            for first in one.firsts.values():
                start = free[0]
                heapreplace(free, start + first)
                end = max(end, start + first)
            if end > one.deadline:
                if one is new:
                    return end - now
                if one.deadline >= new.deadline and end - new.first_s <= one.deadline:
                    return one.deadline - now + new.first_s  # the new job would make this one late
        return 0.0

    def begin(self, item: Item, thread: int) -> float:
        """The time (perf_counter seconds) by which a text that starts now must exit; occupies its thread until then.

        After its first exit, the text gets a share of the time that no admitted job needs, in proportion to its share
        of the admitted work. A text of a late job gets none: the returned time is now, and the text exits at its
        first exit.
        """
        now, job = perf_counter(), item.job
        with self._lock:
            own = self._admitted.get(job)
            if own is None:  # dropped in the meantime
                return now
            own.firsts.pop(item)
            own.first_s -= item.first_exit_s
            own.predicted_s -= item.predicted_s
            extra, first_s, predicted_s, longest = float("inf"), item.first_exit_s, item.predicted_s, 0.0
            for one in sorted(self._admitted.values(), key=lambda p: p.deadline):
                first_s += one.first_s
                predicted_s += one.predicted_s
                longest = max(longest, max(one.firsts.values(), default=0.0))
                if one.deadline >= own.deadline:
                    left = sum(
                        max(0.0, one.deadline - max(now, 0.0 if i == thread else t))
                        for i, t in enumerate(self._free_at)
                    )
                    # List scheduling on n threads wastes at most n − 1 times the longest text (Graham's bound).
                    spare = left - first_s - (len(self._free_at) - 1) * longest
                    extra = min(extra, spare * item.predicted_s / max(predicted_s, 1e-9))
            if not own.firsts:
                del self._admitted[job]
            ends = now if job.is_late else min(own.deadline, now + item.first_exit_s + max(0.0, extra))
            self._free_at[thread] = max(ends, now + item.first_exit_s)
            return ends

    def drop(self, job: Job) -> None:
        """Remove a dropped job."""
        with self._lock:
            self._admitted.pop(job, None)
