"""Stops calls to an upstream that does not work, and tries again after a pause."""

from collections.abc import Callable
from time import monotonic

FAILURES = 5  # consecutive outages that open the breaker
PAUSE_S, MAX_PAUSE_S = 1.0, 30.0


class Breaker:
    """A circuit breaker: open after FAILURES outages in a row; after each pause, one call is tried."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures, self._pause_s, self._until = 0, PAUSE_S, 0.0
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """True while calls are refused, or only one of them is tried."""
        return self._failures >= FAILURES

    def wait_s(self) -> float:
        """Seconds until a call may be tried; 0: now."""
        if not self.is_open:
            return 0.0
        return max(self._until - self._clock(), PAUSE_S if self._is_trying else 0.0)

    def begin(self) -> bool:
        """Record the start of a call, if wait_s() is 0; returns True if it is a trial."""
        is_trial = self.is_open
        self._is_trying |= is_trial
        return is_trial

    def end(self, is_trial: bool, is_outage: bool | None, retry_after_s: float | None = None) -> None:
        """Record the end of a call; is_outage: None if it is unknown, because the call was cancelled."""
        if is_trial:
            self._is_trying = False
        if is_outage is None:
            return
        if not is_outage:
            self._failures, self._pause_s = 0, PAUSE_S
            return
        was_open = self.is_open
        self._failures += 1
        if is_trial or (self.is_open and not was_open):
            self._until = self._clock() + max(self._pause_s, min(retry_after_s or 0.0, MAX_PAUSE_S))
            self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
