"""Work that the event loop waits for, and the end of the process does not."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def in_background(function: Callable[[], T]) -> T:
    """What a function returns, run in a thread of its own.

    Unlike asyncio.to_thread, whose threads are joined at exit: a stopped server would wait for a model that
    takes long to load.
    """
    result: Future[T] = Future()

    def run() -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, name="de3-load", daemon=True).start()
    return await asyncio.wrap_future(result)
