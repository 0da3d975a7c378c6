"""The attacking process of `python -m lab attack`: many nonblocking connections in one thread.

It runs as a separate process at nice 19, so that it competes neither for the measuring client's interpreter nor for
the server's cores. A remote attacker would not compete for them either.
"""

import heapq
import json
import os
import resource
import select
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic

from lab.attacks import ATTACKS, Answer, Attack

BACK_OFF_S = 0.2  # before a closed connection is reopened
MAX_OPENED_PER_S = 500.0  # the attacks target the server's limits and are not a SYN flood
BIND_ADDRESS_NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: the port is assigned at connect()
TURN_BYTES = 2**20  # sent on one connection before the next one takes its turn
RECEIVE_BYTES = 2**16
PREPARED = 8  # scripts whose requests are built before the attack starts; no attack has more variants


@dataclass
class Sent:
    """The traffic of an attack.

    Attributes:
        connections: number of opened connections.
        closed: number of connections that the server closed or refused.
        megabytes: amount of data sent.
        statuses: number of answers by status.
    """

    connections: int = 0
    closed: int = 0
    megabytes: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)


class _Connection:
    """One connection and the state of its script."""

    def __init__(self, number: int, attack: Attack) -> None:
        self.script = attack.script(number)
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((attack.address(number), 0))
        self.number = number
        self.unsent = memoryview(b"")
        self.received = b""
        self.awaits_answer = False
        self.is_paused = False


class Attacker:
    """Runs an attack's script on several connections at once."""

    def __init__(self, attack: Attack, port: int, connections: int) -> None:
        self._attack, self._address = attack, ("127.0.0.1", port)
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._timers: list[
            tuple[float, int, int, _Connection | None]
        ] = []  # due time, tie-breaker, number, connection to resume (None: open one)
        self._ties = 0
        self.sent = Sent()
        self._next_open = monotonic()
        for number in range(connections):
            self._open_later(number)

    def run(self, seconds: float) -> Sent:
        """Attack for `seconds` and return the traffic."""
        end = monotonic() + seconds
        while (now := monotonic()) < end:
            self._run_timers(now)
            next_timer = self._timers[0][0] if self._timers else end
            for fileno, events in self._epoll.poll(max(0.0, min(next_timer, end) - monotonic())):
                connection = self._open.get(fileno)
                if connection is not None:
                    self._on_events(connection, events)
        for connection in self._open.values():
            connection.socket.close()
        return self.sent

    def _open_later(self, number: int, seconds: float = 0.0) -> None:
        """Open a connection after `seconds`, or later if the rate limit for new connections requires it."""
        due = max(self._next_open, monotonic() + seconds)
        self._next_open = due + 1 / MAX_OPENED_PER_S
        self._add_timer(due, number)

    def _add_timer(self, due: float, number: int, paused: _Connection | None = None) -> None:
        self._ties += 1
        heapq.heappush(self._timers, (due, self._ties, number, paused))

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, _, number, paused = heapq.heappop(self._timers)
            if paused is None:
                self._connect(number)
            elif self._open.get(paused.socket.fileno()) is paused:
                paused.is_paused = False
                self._continue(paused)

    def _connect(self, number: int) -> None:
        try:
            connection = _Connection(number, self._attack)
            connection.socket.connect_ex(self._address)
        except OSError:  # no free port or file descriptor
            self._open_later(number, BACK_OFF_S)
            return
        self._open[connection.socket.fileno()] = connection
        self._epoll.register(connection.socket, select.EPOLLOUT | self._mask())
        self.sent.connections += 1

    def _mask(self) -> int:
        return select.EPOLLIN if self._attack.reads else select.EPOLLRDHUP

    def _on_events(self, connection: _Connection, events: int) -> None:
        if events & select.EPOLLIN:
            self._receive(connection)
        elif events & (select.EPOLLERR | select.EPOLLHUP | select.EPOLLRDHUP):
            self._reconnect(connection, closed=True)
        elif events & select.EPOLLOUT:
            self._continue(connection)

    def _reconnect(self, connection: _Connection, closed: bool) -> None:
        """Close a connection and open another in its place after BACK_OFF_S."""
        self.sent.closed += closed
        del self._open[connection.socket.fileno()]
        connection.socket.close()
        self._open_later(connection.number, BACK_OFF_S)

    def _receive(self, connection: _Connection) -> None:
        """Read, and continue the script if it waited for this answer."""
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._reconnect(connection, closed=True)
            return
        connection.received += data
        while (status := _take_answer(connection)) is not None:
            self.sent.statuses[status] = self.sent.statuses.get(status, 0) + 1
            connection.awaits_answer = False
        if not connection.awaits_answer and not connection.unsent:
            self._continue(connection)

    def _continue(self, connection: _Connection) -> None:
        """Run the script until it has to wait."""
        turn = 0
        while not connection.awaits_answer and not connection.is_paused:
            if connection.unsent:
                try:
                    count = connection.socket.send(connection.unsent[: TURN_BYTES - turn])
                except BlockingIOError:
                    count = 0
                except OSError:
                    self._reconnect(connection, closed=True)
                    return
                self.sent.megabytes += count / 1e6
                turn += count
                connection.unsent = connection.unsent[count:]
                if count == 0 or turn >= TURN_BYTES:
                    self._epoll.modify(connection.socket, select.EPOLLOUT | self._mask())
                    return
                continue
            step = next(connection.script, None)
            match step:
                case None:
                    self._reconnect(connection, closed=False)
                    return
                case bytes():
                    connection.unsent = memoryview(step)
                case Answer():
                    connection.awaits_answer = True
                case _:
                    connection.is_paused = True
                    self._add_timer(monotonic() + step, connection.number, connection)
        self._epoll.modify(connection.socket, self._mask())


def _take_answer(connection: _Connection) -> str | None:
    """Remove the first answer from the received data and return its status; None if it is incomplete."""
    head, end, body = connection.received.partition(b"\r\n\r\n")
    if not end:
        return None
    length = 0
    for line in head.lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            length = int(value)
    if len(body) < length:
        return None
    connection.received = body[length:]
    return head[9:12].decode("latin-1")


def _be_nice() -> None:
    """Give the server and the well-behaved client priority."""
    os.nice(19)
    with suppress(OSError):  # with autogroups, nice only applies within one group
        Path("/proc/self/autogroup").write_text("19")


def main(name: str, port: int, seconds: float, connections: int) -> None:
    """Print "ready", run the named attack once a line arrives on stdin, and print its traffic as JSON."""
    _be_nice()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    attack = ATTACKS[name]
    for number in range(min(connections, PREPARED)):
        next(attack.script(number))
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(asdict(Attacker(attack, port, connections).run(seconds))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
