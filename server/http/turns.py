"""Starts requests; under load, the networks of the clients take turns."""

import asyncio
from collections import deque
from collections.abc import Callable

from de3.server.background import report

AT_ONCE = 4  # requests started in one iteration of the event loop


class Turns:
    """Starts up to AT_ONCE requests in each iteration of the event loop.

    Further requests wait for the next iterations, in which the networks take turns. So a thousand connections of one
    network that send without pause delay a client in another network by only a few iterations. A request that is alone
    starts at once.
    """

    def __init__(self) -> None:
        self._pending: dict[
            str, deque[Callable[[], None]]
        ] = {}  # by network, in the order of their next turns
        self._left = AT_ONCE
        self._is_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def take(self, network: str, start: Callable[[], None]) -> None:
        """Start a request now, or when its network has its turn."""
        if self._left and not self._pending:
            self._left -= 1
            start()
        else:
            self._pending.setdefault(network, deque()).append(start)
        if not self._is_scheduled:
            self._is_scheduled = True
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._begin_round)

    def _begin_round(self) -> None:
        """Start pending requests in a new iteration of the event loop."""
        self._left, self._is_scheduled = AT_ONCE, bool(self._pending)
        while self._left and self._pending:
            self._left -= 1
            network = next(iter(self._pending))
            starts = self._pending.pop(network)
            try:
                starts.popleft()()
            except Exception as error:  # must not stop the rounds
                report("request_start", error)
            if starts:
                self._pending[network] = starts  # moves the network to the end
        if self._is_scheduled and self._loop is not None:
            self._loop.call_soon(self._begin_round)
