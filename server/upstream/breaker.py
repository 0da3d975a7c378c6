"""Stops calls to an upstream that does not work, and tries again after a pause."""

from collections.abc import Callable
from time import monotonic

FAILURES = 5  # consecutive outages that open the breaker
PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
MAX_SUSPECTS = 256  # clients that are remembered


class Breaker:
    """A circuit breaker: open after FAILURES outages in a row; after each pause, one call is tried.

    Outages that may be due to the texts of one client open it only together with those of another, or if that client is
    alone. If such a trial fails, each other client may try once without a pause.

    Attributes:
        is_open: calls are refused, or only one of them is tried.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures, self._pause_s, self._until = 0, PAUSE_S, 0.0
        # The clients of these outages, or, once it is open, of the trials that failed since a pause; None: not due to a
        # client.
        self._suspects = set[str | None]()
        self.is_open = self._is_trying = False

    def wait_s(self, client: str | None = None) -> float:
        """Seconds until a client's call may be tried; 0: now. None: a client's whose call has failed."""
        if not self.is_open:
            return 0.0
        may_try = client is not None and self._suspects and client not in self._suspects
        return max(0.0 if may_try else self._until - self._clock(), PAUSE_S if self._is_trying else 0.0)

    def begin(self) -> bool:
        """Record the start of a call, if wait_s() is 0; returns True if it is a trial."""
        is_trial = self.is_open
        self._is_trying |= is_trial
        return is_trial

    def end(
        self,
        is_trial: bool,
        is_outage: bool | None,
        retry_after_s: float | None = None,
        client: str | None = None,
        is_alone: bool = False,
    ) -> None:
        """Record the end of a call.

        is_outage: None if it is unknown, because the call was cancelled. client: the client whose text may be the
        cause; None: no text is. is_alone: no other client is active.
        """
        if is_trial:
            self._is_trying = False
        if is_outage is None:
            return
        if not is_outage:
            self._failures, self._pause_s, self.is_open = 0, PAUSE_S, False
            self._suspects.clear()
            return
        if self.is_open and not is_trial:  # it began before
            return
        self._failures += 1
        if is_alone or (is_trial and client in self._suspects):
            self._suspects.clear()  # after a pause, each client may try once more
        self._suspects.add(client)
        is_certain = is_alone or len(self._suspects) > 1 or None in self._suspects
        if is_trial or (is_certain and self._failures >= FAILURES):
            self._until = self._clock() + max(self._pause_s, min(retry_after_s or 0.0, MAX_PAUSE_S))
            if is_certain:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            opens = not self.is_open and not is_alone
            if opens or None in self._suspects or len(self._suspects) > MAX_SUSPECTS:
                self._suspects.clear()  # all wait for the pause
            self.is_open = True
