"""Runs slow reports, which concurrent requests share, and changes of the models, to completion."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from de3.runtime.background import Task, report_error
from de3.runtime.errors import RequestError

MAX_WAITING = 16
T = TypeVar("T")
_running: set[asyncio.Task[Any]] = set()  # asyncio itself keeps only weak references to tasks


class SharedRun(Generic[T]):
    """Runs a coroutine once for all concurrent requests; the run continues even if they are cancelled."""

    def __init__(self, what: Task, most: int = MAX_WAITING) -> None:
        """what: name of the result, for errors. most: maximum number of waiting requests."""
        self._what, self._most, self._waiting = what, most, 0
        self._running: asyncio.Task[T] | None = None

    async def result(self, run: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of the run in progress, or of a new one; raises RequestError if too many requests wait."""
        if self._waiting >= self._most:
            message = f"the {self._what}: {self._most} requests are already waiting for it; try again"
            raise RequestError(message, cause="busy", retry_after_s=1)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(run())
            _running.add(self._running)
            self._running.add_done_callback(self._ended)
        running = self._running
        self._waiting += 1
        try:
            await asyncio.wait([running])  # asyncio.shield would log errors of its own in Python 3.14
        finally:
            self._waiting -= 1
        return running.result()

    def _ended(self, task: asyncio.Task[T]) -> None:
        """Report an error that no request is waiting for; otherwise the requests report it."""
        _running.discard(task)
        if not self._waiting:
            report_error(self._what, task, RequestError)
