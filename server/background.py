"""Background work that does not delay the exit of the process."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


async def in_background(function: Callable[[], T]) -> T:
    """Run a function in a daemon thread, and return its result.

    asyncio.to_thread is not used, because the interpreter joins that function's threads at exit: a server that stops
    would wait until a model is loaded.
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
