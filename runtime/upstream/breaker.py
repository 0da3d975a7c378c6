"""Stops calls to an upstream that does not work, and tries again after a pause."""

from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

FAILURES = 5  # consecutive outages that open the breaker
PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
GOOD_S = 10.0  # an upstream that has answered a client within this time works for it
MAX_CLIENTS = 256  # clients that are remembered


class Call(NamedTuple):
    """A call in flight.

    Attributes:
        client: whose text is sent.
        period: number of the time for which the breaker was open when the call began; 0: it was closed.
    """

    client: str
    period: int


class Breaker:
    """A circuit breaker: open after FAILURES outages in a row; after each pause, calls are tried one by one.

    Outages that may be due to one client's texts open it only if another client has outages, too, and no third one gets
    answers; or if that client is the only active one. If such a trial fails or is cancelled, other clients may try
    without a pause. A slow trial does not block other clients.

    Attributes:
        is_open: calls are refused, or only some are tried.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._failures, self._pause_s, self._until = 0, PAUSE_S, 0.0
        # The clients of these outages, or, once it is open, of the trials that failed since a pause; None: not due to a
        # client.
        self._suspects = set[str | None]()
        self._good = dict[str, float]()  # time of the last answer to each client, the oldest first
        self._trials, self._tried_at = (
            set[str](),
            0.0,
        )  # clients with a trial in flight; start of the last one
        self.is_open, self._period = False, 0

    def wait_s(self, client: str | None = None) -> float:
        """Seconds until a client's call may be tried; 0: now. None: a client's whose call has failed."""
        if not self.is_open:
            return 0.0
        if client in self._trials:
            return PAUSE_S
        now = self._clock()
        may_try = client is not None and self._suspects and client not in self._suspects
        pause_s = 0.0 if may_try else self._until - now
        return max(0.0, pause_s, self._tried_at + PAUSE_S - now if self._trials else 0.0)

    def begin(self, client: str) -> Call:
        """Record the start of a call, if wait_s() is 0."""
        if self.is_open:
            self._trials.add(client)
            self._tried_at = self._clock()
        return Call(client, self._period if self.is_open else 0)

    def end(
        self,
        call: Call,
        is_outage: bool | None,
        retry_after_s: float | None = None,
        is_certain: bool = False,
        is_alone: bool = False,
    ) -> None:
        """Record the end of a call.

        is_outage: None if it is unknown, because the call was cancelled. is_certain: no text can be the cause.
        is_alone: no other client is active.
        """
        now, is_trial = self._clock(), self.is_open and call.period == self._period
        if call.period:
            self._trials.discard(call.client)
        if is_outage is None:
            if is_trial:
                if call.client in self._suspects:
                    self._suspects.clear()  # after a pause, each client may try once more
                self._suspects.add(call.client)
                self._until = max(self._until, now + self._pause_s)
            return
        if not is_outage:
            self._failures, self._pause_s, self.is_open = 0, PAUSE_S, False
            self._suspects.clear()
            self._good.pop(call.client, None)
            self._good[call.client] = now
            if len(self._good) > MAX_CLIENTS:
                del self._good[next(iter(self._good))]
            return
        if self.is_open and not is_trial:  # it began before
            return
        self._failures += 1
        client = None if is_certain else call.client
        if is_alone or (is_trial and client in self._suspects):
            self._suspects.clear()  # after a pause, each client may try once more
        self._suspects.add(client)
        works = any(at > now - GOOD_S for one, at in self._good.items() if one not in self._suspects)
        is_known = is_alone or None in self._suspects or (len(self._suspects) > 1 and not works)
        if is_trial or (is_known and self._failures >= FAILURES):
            self._until = now + max(self._pause_s, min(retry_after_s or 0.0, MAX_PAUSE_S))
            if is_known:
                self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
            opens = not self.is_open and not is_alone
            if opens or None in self._suspects or len(self._suspects) > MAX_CLIENTS:
                self._suspects.clear()  # all wait for the pause
            self._period += not self.is_open
            self.is_open = True
