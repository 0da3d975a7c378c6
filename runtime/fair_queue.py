"""Fair scheduling between clients, by time: of the engine, of calls to upstreams, and of parsing large bodies."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import inf
from time import perf_counter
from typing import Any, Generic, TypeVar

RECENT_S = 60.0  # a client counts as active for this long
MAX_CLIENTS = 4096  # maximum number of clients remembered, unless more than that have pending items
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Client(Generic[T]):
    """A client of a FairQueue.

    Attributes:
        spent: virtual time: seconds of service received. A new client, or one that was idle, starts at the virtual
            time of the clients that are being served, so it cannot save up time.
        items: heap of its pending items: due, order of arrival, item.
        is_listed: it is in the queue's heap of clients to serve next.
    """

    spent: float = 0.0
    items: list[tuple[float, int, T]] = field(default_factory=list)
    is_listed: bool = False


class FairQueue(Generic[T]):
    """Pending items: the client that has received the least service is next, with its item that is due first.

    So each client gets its share regardless of what other clients send, and a lone client gets everything. Whoever
    serves the items adds the seconds that it takes to `spent` of their clients.

    Attributes:
        clients: the known clients, by name.
        listed: heap of clients to serve next. Its copy of `spent` may be out of date; first() updates it.
        order: numbers items in order of arrival.
    """

    def __init__(self, drops: Callable[[T], bool]) -> None:
        """drops: true if an item is no longer needed; it is then removed."""
        self.clients: dict[str, Client[T]] = {}
        self.listed: list[tuple[float, int, Client[T]]] = []
        self.order = count()  # items that are due at the same time are served in order of arrival
        self._drops = drops
        self._floor = 0.0  # virtual time of the clients that are being served
        # The most recently active client, and the most recently active other one, each with the time of its activity.
        self._recent = (("", -inf), ("", -inf))

    def client(self, name: str) -> Client[T]:
        """A client by name; new ones are added."""
        client = self.clients.get(name)
        if client is None:
            if len(self.clients) >= MAX_CLIENTS:
                self._forget_clients()
            client = self.clients[name] = Client(self._floor)
        return client

    def _forget_clients(self) -> None:
        """Forget half of the clients without pending items, and advance the virtual time past them."""
        idle = sorted(c.spent for c in self.clients.values() if not c.is_listed)
        if idle:
            self._floor = max(self._floor, idle[len(idle) // 2])
        self.clients = {n: c for n, c in self.clients.items() if c.is_listed or c.spent > self._floor}

    def add(self, name: str, item: T, due: float = 0.0) -> None:
        """Enqueue an item of a client."""
        client = self.client(name)
        if not self.clean(client.items):
            client.spent = max(client.spent, self._floor)
        heappush(client.items, (due, next(self.order), item))
        if not client.is_listed:
            client.is_listed = True
            heappush(self.listed, (client.spent, next(self.order), client))

    def first(self) -> list[tuple[float, int, T]] | None:
        """The heap of the client that is next, whose first item is due; None if nothing is pending."""
        listed = self.listed
        while listed:
            spent, _, client = listed[0]
            if not self.clean(client.items):
                heappop(listed)
                client.is_listed = False
            elif spent < client.spent:
                heapreplace(listed, (client.spent, next(self.order), client))
            else:
                return client.items
        return None

    def clean(self, heap: list[tuple[float, int, T]]) -> list[tuple[float, int, T]]:
        """Remove items that are no longer needed from the top of a heap, and return it."""
        while heap and self._drops(heap[0][2]):
            heappop(heap)
        return heap

    def serves(self, client: Client[T]) -> None:
        """Advance the virtual time to that of a client that is served in its turn."""
        self._floor = max(self._floor, client.spent)

    def note(self, name: str) -> None:
        """Record that a client is active."""
        last = self._recent[0]
        self._recent = ((name, perf_counter()), self._recent[1] if name == last[0] else last)

    def is_alone(self, name: str, seconds: float) -> bool:
        """True if no other client was active within the last seconds."""
        (last, at), (_, before) = self._recent
        return perf_counter() - (before if last == name else at) > seconds


class Slots:
    """Slots for work on the event loop, such as calls; a free slot goes to the client that has used them least.

    Used time is charged while the work runs, so work that takes long counts before it ends. A client that is not alone
    leaves an eighth of the slots, of four at least one, to those that have none; one that is alone leaves one.
    """

    def __init__(self, slots: int, pauses: bool = False) -> None:
        """pauses: after each use, a slot stays unused for as long again."""
        self._spare = min(slots // 4, max(1, slots // 8))
        self._free, self._pauses, self._charged_at = slots, pauses, perf_counter()
        # Each with the time when a slot was granted.
        self._waiting = FairQueue[tuple[Client[Any], str, asyncio.Future[float]]](lambda item: item[2].done())
        self._running = Counter[Client[Any]]()  # used slots by client

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """Hold a slot for a client for the duration of the context."""
        loop, client = asyncio.get_running_loop(), self._waiting.client(name)
        granted: asyncio.Future[float] = loop.create_future()
        self._waiting.note(name)
        self._waiting.add(name, (client, name, granted))
        self._grant()
        try:
            await granted
            yield
        finally:
            if not granted.cancelled():
                pause_s = perf_counter() - granted.result() if self._pauses else 0.0
                loop.call_later(pause_s, self._release, client)

    def is_alone(self, name: str) -> bool:
        """True if no other client has asked for a slot within RECENT_S."""
        return self._waiting.is_alone(name, RECENT_S)

    def _release(self, client: Client[Any]) -> None:
        self._charge()
        self._free += 1
        self._running -= Counter([client])
        self._grant()

    def _grant(self) -> None:
        self._charge()
        while self._free and (heap := self._waiting.first()) is not None:
            client, name, _ = heap[0][2]
            spare = min(self._spare, 1) if self.is_alone(name) else self._spare
            if name and self._free <= spare and self._running[client]:  # a program's own texts have no client
                others = [one for *_, one in self._waiting.listed if not self._running[one]]
                others = [one for one in others if self._waiting.clean(one.items)]
                if not others:
                    break
                heap = min(others, key=lambda one: one.spent).items
            client, _, granted = heap[0][2]
            self._free -= 1
            self._running[client] += 1
            self._waiting.serves(client)
            granted.set_result(perf_counter())  # this also removes it from the queue

    def _charge(self) -> None:
        """Charge the clients for the slots in use, up to now."""
        now = perf_counter()
        for client, slots in self._running.items():
            client.spent += slots * (now - self._charged_at)
        self._charged_at = now
