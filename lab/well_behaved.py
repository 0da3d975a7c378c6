"""A well-behaved client during an attack: sends short sentences at a constant rate and records the answers.

Half of the requests use one kept-alive connection, the other half a new connection each. A latency counts from the
time its request was due, so a stall of the server counts for every request that is due during it.
"""

import asyncio
import math
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from de3.loadtest.client import post, quantile

RATE = 20.0  # requests per second over both kinds of connection
TIMEOUT_S = 10.0
REFUSED = (429, 503)
NO_ANSWER = 0  # no answer within TIMEOUT_S, or a failed connection
SENTENCES = (
    *("a warm , funny , engaging film", "it is dull", "the plot was a mess", "a very good story"),
    *("not quite good", "the actor was lovely and the scene was bright", "tired and stale"),
)


@dataclass(frozen=True)
class Phase:
    """The answers to the requests of one phase.

    Attributes:
        p50_ms, p99_ms, max_ms: latency of the answers with status 200; nan if there are none.
        refused: number of answers with 429 or 503.
        errors: number of answers with any other status except 200.
        unanswered: number of requests without an answer within TIMEOUT_S, or whose connection failed.
        reopened: number of requests sent again because the server had closed the kept-alive connection.
    """

    requests: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    refused: int
    errors: int
    unanswered: int
    reopened: int

    @classmethod
    def of(cls, answers: "Sequence[Answer]") -> "Phase":
        """Summarize answers."""
        latencies = [a.latency_ms for a in answers if a.status == 200]
        statuses = [a.status for a in answers]
        refused, unanswered = sum(s in REFUSED for s in statuses), statuses.count(NO_ANSWER)
        return cls(
            len(answers),
            round(quantile(latencies, 0.5), 2),
            round(quantile(latencies, 0.99), 2),
            round(quantile(latencies, 1.0), 2),
            refused,
            len(answers) - len(latencies) - refused - unanswered,
            unanswered,
            sum(a.reopened for a in answers),
        )


@dataclass(frozen=True)
class Answer:
    """The result of one request.

    Attributes:
        due: when the request was due, by time.monotonic.
        latency_ms: time from `due` to the answer or failure.
        status: HTTP status, or NO_ANSWER.
        with_budget: the request had a latency budget.
        reopened: the request was sent again because the server had closed the kept-alive connection.
    """

    due: float
    latency_ms: float
    status: int
    with_budget: bool = False
    reopened: bool = False


class WellBehavedClient:
    """The well-behaved client, in its own thread; it sends requests while its `with` block runs.

    Args:
        budget_ms: latency budget of additional requests, at half the rate; None: no such requests.
        key: the client's API key; empty: it has none.
    """

    def __init__(self, port: int, budget_ms: float | None = None, key: str = "") -> None:
        self._port, self._budget_ms, self._key = port, budget_ms, key
        self._answers: list[Answer] = []
        self._end = math.inf
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "WellBehavedClient":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop sending, and wait for the answers to all requests."""
        self._end = monotonic()
        self._thread.join()

    def between(self, start: float, end: float) -> list[Answer]:
        """The answers to requests without a budget that were due in [start, end)."""
        return [a for a in self._answers if start <= a.due < end and not a.with_budget]

    def budgets(self, start: float, end: float) -> tuple[int, int]:
        """The number of requests with a budget due in [start, end), and the number answered within the budget."""
        answers = [a for a in self._answers if start <= a.due < end and a.with_budget]
        budget = self._budget_ms or 0.0
        return len(answers), sum(a.status == 200 and a.latency_ms <= budget for a in answers)

    async def _run(self) -> None:
        _use_realtime_priority()
        clients = [self._kept(False), self._new()]
        if self._budget_ms is not None:
            clients.append(self._kept(True))
        await asyncio.gather(*clients)

    def _request(self, number: int, with_budget: bool) -> bytes:
        fields: dict[str, Any] = {"input": SENTENCES[number % len(SENTENCES)]}
        if with_budget:
            fields["latency_budget_ms"] = self._budget_ms
        return authorized(post(fields), self._key)

    async def _kept(self, with_budget: bool) -> None:
        """Send requests on one connection, which is reopened if the server closes it between requests."""
        connection = _Connection(self._port)
        due, number = monotonic(), 0
        while due < self._end:
            await asyncio.sleep(due - monotonic())
            request = self._request(number, with_budget)
            status, reopened = NO_ANSWER, False
            if monotonic() - due < TIMEOUT_S:  # else the request has timed out already
                status, reopened = await connection.ask(request)
            self._answers.append(Answer(due, _since_ms(due), status, with_budget, reopened))
            due, number = due + 2 / RATE, number + 1
        connection.close()

    async def _new(self) -> None:
        """Send each request on a new connection, whether or not earlier ones have been answered."""
        due, number = monotonic() + 1 / RATE, 0
        async with asyncio.TaskGroup() as tasks:
            while due < self._end:
                await asyncio.sleep(due - monotonic())
                tasks.create_task(self._once(due, number))
                due, number = due + 2 / RATE, number + 1

    async def _once(self, due: float, number: int) -> None:
        connection = _Connection(self._port)
        status, _ = await connection.ask(self._request(number, False))
        self._answers.append(Answer(due, _since_ms(due), status))
        connection.close()


def authorized(request: bytes, key: str) -> bytes:
    """The bytes of a request, with an API key; empty: none."""
    return request.replace(b"\r\n", f"\r\nAuthorization: Bearer {key}\r\n".encode(), 1) if key else request


def _use_realtime_priority() -> None:
    """Give this thread real-time priority where permitted (as root): a remote client would not compete for cores."""
    with suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _since_ms(due: float) -> float:
    return 1000 * (monotonic() - due)


class _Stale(Exception):
    """Raised if the server closed a connection before it sent any part of the answer."""


class _Connection:
    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def ask(self, request: bytes) -> tuple[int, bool]:
        """Send a request; returns the status or NO_ANSWER, and True if a kept-alive connection was reopened."""
        reopened = False
        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._streams is not None:
                    try:
                        return await self._try(*self._streams, request), False
                    except _Stale:  # the server may close an idle connection; a client then retries
                        self.close()
                        reopened = True
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
                return await self._try(*self._streams, request), reopened
        except (_Stale, OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            self.close()
            return NO_ANSWER, reopened

    async def _try(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
        try:
            writer.write(request)
            start = await reader.readexactly(1)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise _Stale from error
        head = (start + await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        return int(head[9:12])
