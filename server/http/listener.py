"""What the connections of a server share: their number, what they may read and buffer, and who is evicted."""

import asyncio
import random
from time import monotonic
from typing import Any, Protocol

from starlette.types import ASGIApp, Scope

from de3.server.http.connection import BODY, RESPONSE, Connection
from de3.server.shares import Shares

MAX_UNREAD_BYTES = 2**26  # of responses that clients do not read, on all connections
# Of bodies that do not arrive in one piece, on all connections: reading them takes a fifth of the event
# loop's time.
MAX_BODY_BYTES_PER_S = 2.5e8
PIPELINE_PAUSE_S = 0.001  # between two pipelined requests, on all connections
SWEEP_S = 0.25
MAX_ADDRESS_RATIO = 8  # of an address's connections to those that are left for others
EVICTION_SAMPLE = 256  # connections among which the one to evict is chosen


class Gate(Protocol):
    """What a connection asks before it reads a body; `Frontend` is one."""

    bytes_in_flight: Shares

    def admit(self, scope: Scope) -> str | None:
        """The client whose request this is; None if no body is needed to answer it. Raises RequestError for a
        request that is refused whatever its body says."""

    def address(self, peer: tuple[str, int] | None) -> str:
        """The address, or the IPv6 network, of a connection's other end."""

    def malformed(self) -> None:
        """Count a request that is not HTTP."""

    def dropped(self, reason: str) -> None:
        """Count a connection that was closed at a limit."""


class Listener:
    """What the connections of a server share.

    Attributes:
        connections: those that are open.
    """

    def __init__(
        self, app: ASGIApp, gate: Gate, max_connections: int, max_body_bytes: int, body_timeout_s: float
    ) -> None:
        self.app, self.gate = app, gate
        self.max_connections, self.max_body_bytes = max_connections, max_body_bytes
        self.body_timeout_s = body_timeout_s
        self.connections: set[Connection] = set()
        self._by_address: dict[str, set[Connection]] = {}
        self._paused: set[Connection] = set()
        self._sweeping = False
        self._read_at = 0.0  # when the next part of a body may be read (monotonic seconds)
        self._pipelined_at = 0.0  # when the next pipelined request may be answered

    def connection(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any) -> Connection:
        """Make a connection; called by uvicorn."""
        return Connection(
            self, config.root_path, server_state, app_state, _loop or asyncio.get_running_loop()
        )

    def opened(self, connection: Connection) -> None:
        """Count a connection; evict one if its address has more than MAX_ADDRESS_RATIO times as many as are left.

        The victim is a connection without a request in progress, of the address that has the most; first those
        on which nothing was answered yet, first the oldest. If there is none, it is the new one.
        """
        self.connections.add(connection)
        mine = self._by_address.setdefault(connection.address, set())
        mine.add(connection)
        if len(mine) > MAX_ADDRESS_RATIO * (self.max_connections - len(self.connections)):
            sample = random.sample(tuple(self.connections), min(EVICTION_SAMPLE, len(self.connections)))
            spare = [c for c in (*sample, connection) if c.state != RESPONSE]
            victim = max(
                spare, key=lambda c: (len(self._by_address[c.address]), not c.responses, -c.opened_at)
            )
            self.gate.dropped("connection_limit")
            victim.abort()
        if not self._sweeping:
            self._sweeping = True
            connection.loop.call_later(SWEEP_S, self._sweep, connection.loop)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        self._paused.discard(connection)
        self._by_address[connection.address].discard(connection)
        if not self._by_address[connection.address]:
            del self._by_address[connection.address]

    def wait_to_read(self, size: int) -> float:
        """Seconds to wait, after so many bytes of a body, before more of it is read."""
        now = monotonic()
        self._read_at = max(now, self._read_at) + size / MAX_BODY_BYTES_PER_S
        return self._read_at - now

    def wait_for_pipelined(self) -> float:
        """Seconds to wait before the next pipelined request is answered."""
        now = monotonic()
        self._pipelined_at = max(now, self._pipelined_at + PIPELINE_PAUSE_S)
        return self._pipelined_at - now

    def paused(self, connection: Connection) -> None:
        """Note a client that does not read; if too much is unread in all, abort the largest."""
        self._paused.add(connection)
        unread = {c: c.unread() for c in self._paused}
        while sum(unread.values()) > MAX_UNREAD_BYTES:
            worst = max(unread, key=lambda c: unread[c])
            del unread[worst]
            self.gate.dropped("unread")
            worst.abort()

    @property
    def paused_connections(self) -> int:
        """Clients that do not read what is sent to them."""
        return len(self._paused)

    def make_room(self, client: str) -> bool:
        """Refuse an unfinished body in favour of a client that is within its share; false if there is none.

        It is the largest body of the client that has the most bytes in flight.
        """
        shares = self.gate.bytes_in_flight
        unfinished = [c for c in self.connections if c.state == BODY and c.body_bytes and c.client != client]
        if not unfinished:
            return False
        max(unfinished, key=lambda c: (shares.amount(c.client), c.body_bytes)).refuse_body()
        return True

    def resumed(self, connection: Connection) -> None:
        """A client reads again."""
        self._paused.discard(connection)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """End what is past its deadline; cheaper than a timer for each request."""
        self._sweeping = bool(self.connections)
        if self._sweeping:
            loop.call_later(SWEEP_S, self._sweep, loop)
        now = monotonic()
        for connection in [c for c in self.connections if c.deadline < now or c.write_deadline < now]:
            connection.expire(now)
