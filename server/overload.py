"""Under load: raise the default τ step by step, then shed; lower it again when the load is over."""

from collections.abc import Callable
from time import perf_counter

TICK_S = 0.05
# Of the latency objective, for the mean queue time of a new text; the p99 latency measured 2 to 3 times that.
RAISE_ABOVE, LOWER_BELOW, SHED_ABOVE = 0.2, 0.08, 0.3
CALM_S = 1.0  # below LOWER_BELOW for this long: the first step down
CALM_STEP_S = 0.25  # then one step each; far below the capacity, one each tick
FAR_BELOW = 0.7  # of the capacity
MEMORY = 0.3  # weight of the newest tick in the estimate of the capacity


class Controller:
    """Predicts the queue time of a new text by Little's law: texts queued before it / texts finished per second.

    Texts that are running do not count: on an idle server nothing is queued, however slow the model is.

    Attributes:
        level: 0: every model's default τ; up to `levels` steps above it, which change with the models.
    """

    def __init__(
        self,
        objective_s: float,
        levels: Callable[[], int],
        capacity: float,
        threads: int,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """capacity: a first guess, in texts per second."""
        self._objective, self._levels, self._capacity = objective_s, levels, capacity
        self._threads = threads
        self._clock = clock
        self._last, self._finished = clock(), 0
        self._least = 0  # in flight, since the last tick
        self._calm_at = self._last + CALM_S
        self.level = 0

    def predicted_s(self, queued: int) -> float:
        """Predicted queue time of a new text in seconds, with so many texts before it."""
        return max(0, queued - self._threads) / self._capacity

    def sheds(self, in_flight: int, queued: Callable[[], int]) -> bool:
        """Whether a new request must be shed: τ is at its highest step, and still it would be late.

        Called for every request, so what is queued before it is counted only if all texts in flight would be
        too many. In a burst τ jumps to its last step at once.
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
        """Adjust the level, about every TICK_S. finished: texts so far."""
        now = self._clock()
        rate = (finished - self._finished) / max(now - self._last, 1e-6)
        self._last, self._finished = now, finished
        # Only a server that was never idle shows its capacity.
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
