"""Background tasks: errors are logged and counted, and a task that fails is started again."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from threading import Lock, Thread
from time import monotonic
from typing import Any, Literal, TypeVar, get_args

from de3.runtime.failures import FailureLog

T = TypeVar("T")
failures = FailureLog(logging.getLogger("de3"))
# Pause before a failed task is started again. It doubles, unless the task ran for MAX_PAUSE_S.
PAUSE_S, MAX_PAUSE_S = 0.1, 30.0

# Names of the tasks, and of parts of them that can fail separately: values of a metric label.
Task = Literal[
    "audits",
    "channel",
    "connection",
    "connection_deadlines",
    "counting_audits",
    "counting_texts",
    "engine",
    "engine_callback",
    "engine_watchdog",
    "event_loop",
    "fit",
    "freeing_memory",
    "hint",
    "int8",
    "last_audits",
    "learning",
    "load_control",
    "message",
    "metrics",
    "model_change",
    "pausing_fit",
    "process",
    "process_loading",
    "reading_metrics",
    "report",
    "request_start",
    "saving_audits",
    "traces",
    "upstream",
    "upstream_audit",
]
errors = Counter[str](dict.fromkeys(get_args(Task), 0))  # unexpected errors in this process
_counting = Lock()
_running: set[asyncio.Task[Any]] = set()  # asyncio itself keeps only weak references to tasks


def report(task: Task, error: BaseException) -> None:
    """Log and count an unexpected error; safe to call from any thread."""
    failures.log(f"{task.replace('_', ' ')} failed", error=error)
    with _counting:  # after logging, so that a counted error is in the log
        errors[task] += 1


def report_error(task: Task, ended: asyncio.Task[Any], expected: type[Exception] | tuple[()] = ()) -> None:
    """Report the error, if any, of an asyncio task that has ended, unless it is of the type `expected`."""
    if ended.cancelled():
        return
    error = ended.exception()
    if error is not None and not isinstance(error, expected):
        report(task, error)


class Backoff:
    """Pauses before a task that keeps failing is started again."""

    def __init__(self) -> None:
        self._next_s, self._started = PAUSE_S, monotonic()

    def pause_s(self) -> float:
        """The pause after another failure, seconds."""
        if monotonic() - self._started > MAX_PAUSE_S:
            self._next_s = PAUSE_S
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, MAX_PAUSE_S)
        self._started = monotonic() + pause_s
        return pause_s


def keep_running(task: Task, run: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    """Start a task that ends only if `run` returns or if it is cancelled; after an error, it is started again."""

    async def keep() -> None:
        backoff = Backoff()
        while True:
            try:
                await run()
                return
            except Exception as error:
                report(task, error)
            await asyncio.sleep(backoff.pause_s())

    return run_once(task, keep())


def run_once(task: Task, running: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task; its error is logged and counted even if nobody awaits the task."""

    def ended(done: asyncio.Task[T]) -> None:
        _running.discard(done)
        report_error(task, done)

    started = asyncio.ensure_future(running)
    _running.add(started)
    started.add_done_callback(ended)
    return started


def report_unhandled(loop: asyncio.AbstractEventLoop) -> None:
    """Log and count errors that reach the event loop, such as those of its callbacks; the loop continues."""

    def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        report("event_loop", context.get("exception") or RuntimeError(context["message"]))

    loop.set_exception_handler(handle)


async def in_background(function: Callable[[], T]) -> T:
    """Run a function in a daemon thread, and return its result.

    asyncio.to_thread is not used, because the interpreter joins that function's threads at exit: a stopping server
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
