"""Upstreams of programs without an event loop: `de3.load` and `de3 classify`."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from math import inf
from threading import Thread
from time import monotonic
from typing import Any, TypeVar

from de3.runtime.engine.job import Job
from de3.runtime.errors import RequestError
from de3.runtime.settings import RuntimeSettings
from de3.runtime.upstream.answer import ask_upstreams
from de3.runtime.upstream.client import CallError, Reply
from de3.runtime.upstream.upstreams import ATTEMPTS, Upstreams
from de3.runtime.upstream.usage import Query

T = TypeVar("T")
PAUSES_S = 5.0  # time for the pauses between the attempts of a call
# A text that times out or gets a server error has no answer after this many rounds of attempts while the upstream works
# for other texts, or after this time.
TRIES, GIVE_UP_S = 3, 3600.0


class Calls:
    """Calls upstreams from an event loop in a separate thread; implements `Asks`. Call close() at the end.

    A text waits for its turn without a time limit, because there may be any number of texts.

    Attributes:
        upstreams: the upstreams, with their usage.
    """

    def __init__(self, settings: RuntimeSettings, say: Callable[[str], None] | None = None) -> None:
        """say: called with a message when the upstream is away or over its quota, and texts wait; None: they fail.

        Raises ValueError if a key is missing.
        """
        self.upstreams, self._settings, self._say = Upstreams(settings), settings, say
        # No more texts than this reach a Caller, which refuses texts if too many wait.
        self._turns = {of.name: asyncio.Semaphore(of.upstream.concurrency) for of in settings.upstreams}
        self._waits_until = 0.0
        started = Future[asyncio.AbstractEventLoop]()
        self._thread = Thread(
            target=lambda: asyncio.run(self._run(started)), name="de3-upstream", daemon=True
        )
        self._thread.start()
        self._loop = started.result()

    async def _run(self, started: "Future[asyncio.AbstractEventLoop]") -> None:
        self._closed = asyncio.Event()
        self.upstreams.start()
        started.set_result(asyncio.get_running_loop())
        await self._closed.wait()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for caller in self.upstreams.all.values():
            await caller.close()
        self.upstreams.stop()

    def close(self, waits: bool = False) -> None:
        """Cancel all calls and end the thread; waits: until it has ended."""
        with suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._closed.set)
        if waits:
            self._thread.join()

    def submit(self, running: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the event loop."""
        return asyncio.run_coroutine_threadsafe(running, self._loop)

    def complete(self, job: Job) -> None:
        """Complete the outcomes of a finished job; see ask_upstreams. Raises RuntimeError after close()."""
        future = self.submit(ask_upstreams(job, self._settings, self))
        try:
            future.result()
        except CancelledError:
            raise RuntimeError("the classifier is closed") from None
        finally:
            future.cancel()  # after Ctrl+C

    async def ask(self, name: str, query: Query, timeout_s: float, is_budget: bool) -> Reply:
        """The answer of a model's upstream; raises RequestError. timeout_s: only used if it is a latency budget."""
        caller, failures, since = self.upstreams.all[name], 0, inf
        if is_budget:
            return await caller.ask(query, timeout_s, is_budget)
        timeout_s = ATTEMPTS * caller.of.upstream.timeout_s + PAUSES_S
        async with self._turns[name]:
            while True:
                try:
                    return await caller.ask(query, timeout_s)
                except RequestError as error:
                    cause, wait_s, now = error.__cause__, error.retry_after_s, monotonic()
                    is_refused = isinstance(cause, CallError) and cause.why in ("refused", "redirect")
                    if is_refused and wait_s is not None and not caller.usage.usual_s():
                        raise ValueError(
                            error.message
                        ) from None  # such as a wrong key: waiting does not help
                    if isinstance(cause, CallError) and cause.why in ("timeout", "server_error"):
                        failures, since = failures + caller.is_available, min(since, now)
                    if self._say is None or wait_s is None or failures == TRIES or now - since > GIVE_UP_S:
                        raise
                    if now >= self._waits_until:  # once for all texts that wait
                        self._say(f"{error.message}; texts wait, and are tried again in {wait_s} s")
                        self._waits_until = now + wait_s
                await asyncio.sleep(wait_s)

    def answered(self, name: str, local: int, others: int) -> None:
        """Count texts that were answered by a model, and by its upstream."""
        self.upstreams.answered(name, local, others)


class Placeholders:
    """Implements `Asks` where another process calls the upstreams: it replaces the label, the first, and probs."""

    def __init__(self, settings: RuntimeSettings) -> None:
        self._settings = settings

    def complete(self, job: Job) -> None:
        """Complete the outcomes of a finished job."""
        asyncio.run(ask_upstreams(job, self._settings, self))

    async def ask(self, name: str, query: Query, timeout_s: float, is_budget: bool) -> Reply:
        """The placeholder."""
        return Reply(0)

    def answered(self, name: str, local: int, others: int) -> None:
        """Nothing is counted here."""

    def close(self) -> None:
        """Nothing runs."""
