"""Overload control: raises the default τ step by step, then sheds requests; lowers τ when the load falls."""

from collections.abc import Callable
from time import perf_counter

TICK_S = 0.05
# Thresholds of the predicted queue time, as shares of the latency objective. The p99 latency was measured to be 2 to 3
# times the mean queue time.
RAISE_ABOVE, LOWER_BELOW, SHED_ABOVE = 0.2, 0.08, 0.3
CALM_S = 1.0  # time below LOWER_BELOW before the first step down
CALM_STEP_S = 0.25  # time before each further step down; one step per tick if far below capacity
FAR_BELOW = 0.7  # share of the capacity below which the rate counts as far below it
MEMORY = 0.3  # weight of the newest tick in the estimated capacity


class Controller:
    """Sets the load level, and sheds requests, based on the predicted queue time of a new text.

    The prediction follows Little's law: texts queued before it / texts finished per second. Running texts do not count:
    on an idle server nothing is queued, however slow the model is.

    Attributes:
        level: number of steps by which the default τ of every model is raised, from 0 to `levels()`, which depends on
            the loaded models.
    """

    def __init__(
        self,
        objective_s: float,
        levels: Callable[[], int],
        capacity: float,
        threads: int,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """objective_s: latency objective. levels: returns the highest level.

        capacity: initial estimate, texts per second. threads: number of engine threads. clock: returns the current
        time, seconds.
        """
        self._objective, self._levels, self._capacity = objective_s, levels, capacity
        self._threads = threads
        self._clock = clock
        self._last, self._finished = clock(), 0
        self._least = 0  # fewest texts in flight since the last tick
        self._calm_at = self._last + CALM_S
        self.level = 0

    def predicted_s(self, queued: int) -> float:
        """Predicted queue time of a new text with this many texts before it, seconds."""
        return max(0, queued - self._threads) / self._capacity

    def sheds(self, in_flight: int, queued: Callable[[], int]) -> bool:
        """True if a new request must be shed: it would be late even with τ at its highest step.

        Called for every request, so the queue is counted only if the texts in flight exceed the threshold. In a burst,
        τ jumps to its last step at once.
        """
        self._least = min(self._least, in_flight)
        most = SHED_ABOVE * self._objective
        if self.predicted_s(in_flight) <= most or self.predicted_s(queued()) <= most:
            return False
        if self.level < self._levels():
            self.level = self._levels()
            return False
        return True

    def tick(self, in_flight: int, queued: int, finished: int) -> None:
        """Adjust the level; called every TICK_S.

        queued: number of texts queued before a new short text. finished: total number of finished texts.
        """
        now = self._clock()
        rate = (finished - self._finished) / max(now - self._last, 1e-6)
        self._last, self._finished = now, finished
        # The rate measures the capacity only if the server was never idle since the last tick.
        if min(in_flight, self._least) > 2 * self._threads:
            self._capacity += MEMORY * (max(rate, 1.0) - self._capacity)
        else:
            self._capacity = max(self._capacity, rate)
        self._least = in_flight
        share = self.predicted_s(queued) / self._objective
        if share > RAISE_ABOVE:
            self.level = min(self.level + 1, self._levels())
        if share > LOWER_BELOW:
            self._calm_at = now + CALM_S
        elif now >= self._calm_at and self.level > 0:
            self.level -= 1
            self._calm_at = now + (CALM_STEP_S if rate > FAR_BELOW * self._capacity else 0.0)
