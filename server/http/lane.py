"""Turns for parsing large bodies: one at a time, with pauses, so parsing takes at most half the event loop's time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter


class Lane:
    """Grants one turn at a time, to clients in rotation; a pause of the same length follows each turn."""

    def __init__(self) -> None:
        self._pending: dict[str, deque[asyncio.Future[None]]] = {}  # by client, in the order of turns
        self._is_free = True

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn; the turn lasts as long as the context."""
        if not self._is_free:
            own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._pending.setdefault(client, deque()).append(own)
            try:
                await own
            except asyncio.CancelledError:
                if own.done() and not own.cancelled():  # the turn was granted at the same moment
                    self._pass_on()
                raise
        self._is_free = False
        started = perf_counter()
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(perf_counter() - started, self._pass_on)

    def _pass_on(self) -> None:
        """Grant the next turn."""
        self._is_free = True
        while self._pending and self._is_free:
            client = next(iter(self._pending))
            futures = self._pending.pop(client)
            while futures and self._is_free:
                future = futures.popleft()
                if not future.done():
                    self._is_free = False
                    future.set_result(None)
            if futures:
                self._pending[client] = futures  # moves the client to the end
