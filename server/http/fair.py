"""Fair starting of requests on the event loop, by network."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from de3.runtime.background import report

AT_ONCE = 4  # requests started in one iteration of the event loop
T = TypeVar("T")


class RoundRobin(Generic[T]):
    """Pending items, taken in rotation over their owners.

    Attributes:
        pending: the items by owner, in the order of rotation.
    """

    def __init__(self) -> None:
        self.pending: dict[str, deque[T]] = {}

    def add(self, owner: str, item: T) -> None:
        """Append an item to the queue of its owner."""
        self.pending.setdefault(owner, deque()).append(item)

    def take(self) -> T:
        """Remove the first item of the next owner, who moves to the end."""
        owner = next(iter(self.pending))
        items = self.pending.pop(owner)
        item = items.popleft()
        if items:
            self.pending[owner] = items
        return item


class StartQueue:
    """Starts up to AT_ONCE requests in each iteration of the event loop.

    Further requests wait for the next iterations, in rotation over the networks. So a thousand connections of one
    network that send without pause delay a client in another network by only a few iterations. A lone request starts
    at once.
    """

    def __init__(self) -> None:
        self._pending = RoundRobin[Callable[[], None]]()
        self._left = AT_ONCE
        self._is_scheduled = False

    def add(self, network: str, start: Callable[[], None]) -> None:
        """Start a request now, or when it is the turn of its network."""
        if self._left and not self._pending.pending:
            self._left -= 1
            start()
        else:
            self._pending.add(network, start)
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._begin_round)

    def _begin_round(self) -> None:
        """Start pending requests in a new iteration of the event loop."""
        self._left, self._is_scheduled = AT_ONCE, bool(self._pending.pending)
        while self._left and self._pending.pending:
            self._left -= 1
            try:
                self._pending.take()()
            except Exception as error:  # an error must not stop the rotation
                report("request_start", error)
        if self._is_scheduled:
            asyncio.get_running_loop().call_soon(self._begin_round)
