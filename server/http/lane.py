"""Large bodies are parsed one at a time, so that parsing leaves the event loop to others half of the time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter


class Lane:
    """One turn at a time, the clients that wait in rotation; after each turn a pause as long as it took."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of their next turns
        self._is_free = True

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn and have it."""
        if not self._is_free:
            mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(client, deque()).append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if mine.done() and not mine.cancelled():  # it was given the turn in the same moment
                    self._pass_on()
                raise
        self._is_free = False
        started = perf_counter()
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(perf_counter() - started, self._pass_on)

    def _pass_on(self) -> None:
        """Give the turn to the next client."""
        self._is_free = True
        while self._waiting and self._is_free:
            client = next(iter(self._waiting))
            futures = self._waiting.pop(client)
            while futures and self._is_free:
                future = futures.popleft()
                if not future.done():
                    self._is_free = False
                    future.set_result(None)
            if futures:
                self._waiting[client] = futures  # at the end
