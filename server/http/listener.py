"""Limits that all connections of a process share: their number, and the bytes that they read and buffer."""

import asyncio
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from math import inf
from time import monotonic

from de3.runtime.background import report
from de3.server.http.fair import StartQueue
from de3.server.http.frontend import Frontend
from de3.server.settings import Settings

MAX_UNREAD_BYTES = 2**26  # unread bytes of responses, over all connections
# Maximum reading rate of bodies that arrive in pieces, over all connections; reading at this rate takes a fifth of the
# event loop's time.
MAX_BODY_BYTES_PER_S = 2.5e8
BODY_TIMEOUT_S = 10.0
PIPELINE_PAUSE_S = 0.001  # pause between two pipelined requests, over all connections
SWEEP_S = 0.25
MAX_LATE_S = 1.0  # time since the last sweep, after which nothing expires
# Limits on the connections of one network, and of one address, as multiples of the number that are still free.
MAX_NETWORK_RATIO, MAX_ADDRESS_RATIO = 8, 4
EVICTION_SAMPLE = 256  # number of connections from which the one to evict is chosen
FRESH_S = 0.25  # a new connection has this long to send its first request before it counts as silent
IDLE_S = 5.0  # an answered connection is not evicted before silent ones until it has been idle for this long
# Iterations of the event loop after which a new connection has been read, if anything has arrived.
READ_ITERATIONS = 3


# States of a connection, which awaits a head, a body, the application's response, or the client's close.
HEAD, BODY, RESPONSE, LINGER = range(4)


class BaseConnection(ABC):
    """A connection as the listener sees it.

    Attributes:
        state: HEAD, BODY, RESPONSE or LINGER.
        deadline: time by which the client must have sent the awaited data (monotonic seconds).
        write_deadline: time by which the client must have read the written data (monotonic seconds).
        address: the client's address, as `Frontend.address` returns it.
        network: /24 (IPv6: /48) network of the address.
        opened_at: when it was opened (monotonic seconds).
        has_been_read: the event loop has had time to read what the client sent first (READ_ITERATIONS iterations).
        answered_at: when its last response was written (monotonic seconds); None before the first one.
        client: client of the current request, as `Frontend.admit` names it.
        body_bytes: bytes of the request's body that count as in flight.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.state, self.address, self.network = HEAD, "", ""
        self.opened_at = monotonic()
        self.has_been_read = False
        self.answered_at: float | None = None
        self.deadline = self.write_deadline = inf
        self.client, self.body_bytes = "", 0

    @abstractmethod
    def expire(self, now: float) -> None:
        """Close the connection or refuse its request, because a deadline has passed."""

    @abstractmethod
    def abort(self) -> None:
        """Close at once."""

    @abstractmethod
    def unread(self) -> int:
        """Bytes written that the client has not read."""

    @abstractmethod
    def refuse_body(self) -> None:
        """Refuse a request whose body is unfinished, to make room for others."""


class Listener:
    """Limits that all connections of a process share.

    Attributes:
        connections: the open connections.
        starts: the requests that start next.
    """

    def __init__(
        self,
        frontend: Frontend,
        settings: Settings,
        max_connections: int,
        on_closed: Callable[[], None] = lambda: None,
    ) -> None:
        """max_connections: the limit, instead of that in `settings`. on_closed: called for each closed connection."""
        self.frontend, self._on_closed = frontend, on_closed
        self.max_connections, self.max_body_bytes = max_connections, settings.max_body_bytes
        self.keep_alive_s = settings.keep_alive_s
        self.connections: set[BaseConnection] = set()
        self.starts = StartQueue()
        self._per_network, self._per_address = Counter[str](), Counter[str]()
        self._paused: set[BaseConnection] = set()  # those whose clients do not read their responses
        self._sweeping, self._swept_at = False, 0.0
        self._read_at = 0.0  # when the next part of a body may be read (monotonic seconds)
        self._pipelined_at = 0.0  # when the next pipelined request may be answered

    def opened(self, connection: BaseConnection) -> None:
        """Count a new connection.

        If its network or its address then has too many for each one that is still free, evict one.
        """
        self.connections.add(connection)
        self._grow_older(connection, READ_ITERATIONS)
        self._per_network[connection.network] += 1
        self._per_address[connection.address] += 1
        free = self.max_connections - len(self.connections)
        of_network, of_address = self._per_network[connection.network], self._per_address[connection.address]
        if of_network > MAX_NETWORK_RATIO * free or of_address > MAX_ADDRESS_RATIO * free:
            self._evict(connection)
        if not self._sweeping:
            self._sweeping, self._swept_at = True, monotonic()
            connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def _grow_older(self, connection: BaseConnection, iterations: int) -> None:
        if iterations:
            connection.loop.call_soon(self._grow_older, connection, iterations - 1)
        else:
            connection.has_been_read = True

    def _evict(self, new: BaseConnection) -> None:
        """Abort the new connection, or one of a sample of those that await no response.

        Candidates are chosen in this order; the new connection is in group 2 or 6:

        1. spare: idle for IDLE_S since the last response, or silent: older than FRESH_S, without a response so far;
        2. from a network with more than half of all connections, those of the address with most of them first;
        3. without a response so far, unless 5 applies;
        4. idle for FRESH_S since the last response;
        5. unread: the first request may have arrived, but has not been read;
        6. any other.

        Within a group, the later criteria decide, then the longest time idle.
        """
        now, most = monotonic(), len(self.connections) / 2

        def loss(c: BaseConnection) -> tuple[bool, bool, int, bool, bool, bool, float]:
            idle_s = now - (c.opened_at if c.answered_at is None else c.answered_at)
            is_new, is_old = c.answered_at is None and c is not new, idle_s > FRESH_S
            is_unread, is_large = is_new and not c.has_been_read, self._per_network[c.network] > most
            is_idle = c.answered_at is not None and c.state == HEAD and idle_s > IDLE_S
            if is_idle or (is_new and is_old):
                return True, is_large, 0, False, False, False, idle_s
            of_address = self._per_address[c.address] if is_large else 0
            return (
                False,
                is_large,
                of_address,
                is_new and not is_unread,
                is_old and not is_new,
                is_unread,
                idle_s,
            )

        sample = random.sample(tuple(self.connections), min(EVICTION_SAMPLE, len(self.connections)))
        spare = [new, *(c for c in sample if c.state != RESPONSE and c is not new)]
        self.frontend.dropped("connection_limit")
        max(spare, key=loss).abort()

    def closed(self, connection: BaseConnection) -> None:
        """Stop counting a closed connection."""
        if connection not in self.connections:
            return
        self._on_closed()
        self.connections.discard(connection)
        self._paused.discard(connection)
        for counts, key in ((self._per_network, connection.network), (self._per_address, connection.address)):
            counts[key] -= 1
            if not counts[key]:
                del counts[key]

    def wait_to_read(self, size: int) -> float:
        """Seconds to wait before reading on, after `size` bytes of a body."""
        now = monotonic()
        self._read_at = max(now, self._read_at) + size / MAX_BODY_BYTES_PER_S
        return self._read_at - now

    def wait_for_pipelined(self) -> float:
        """Seconds to wait before the next pipelined request is answered."""
        now = monotonic()
        self._pipelined_at = max(now, self._pipelined_at + PIPELINE_PAUSE_S)
        return self._pipelined_at - now

    def paused(self, connection: BaseConnection) -> None:
        """Record a client that does not read; abort those with the most unread bytes while the total is too high."""
        self._paused.add(connection)
        unread = {c: c.unread() for c in self._paused}
        while sum(unread.values()) > MAX_UNREAD_BYTES:
            worst = max(unread, key=lambda c: unread[c])
            del unread[worst]
            self.frontend.dropped("unread")
            worst.abort()

    def make_room(self, client: str) -> bool:
        """Refuse another client's unfinished body to make room for a client within its share; False if there is none.

        The refused body is the largest one of the client with the most bytes in flight.
        """
        shares = self.frontend.bytes_in_flight
        unfinished = [c for c in self.connections if c.state == BODY and c.body_bytes and c.client != client]
        if not unfinished:
            return False
        max(unfinished, key=lambda c: (shares.amount(c.client), c.body_bytes)).refuse_body()
        return True

    def resumed(self, connection: BaseConnection) -> None:
        """Record that a client reads again."""
        self._paused.discard(connection)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Expire connections past a deadline. One periodic sweep is cheaper than a timer for each request.

        If the sweep is late, the process was stalled, and data may have arrived that it has not read yet: the next
        sweep decides.
        """
        self._sweeping = bool(self.connections)
        if self._sweeping:
            loop.call_later(SWEEP_S, self._sweep, loop)
        now = monotonic()
        before, self._swept_at = self._swept_at, now
        if now - before > MAX_LATE_S:
            return
        for connection in [c for c in self.connections if c.deadline < now or c.write_deadline < now]:
            try:
                connection.expire(now)
            except Exception as error:  # must not keep the others from expiring
                report("connection_deadlines", error)
