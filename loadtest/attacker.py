"""The attacking process of `de3 loadtest attack`: many nonblocking connections, one thread, little CPU.

It has a process of its own, at nice 19, so that it takes neither the interpreter of the client that measures
nor, on a machine that all share, the server's cores: an attacker elsewhere would not either.
"""

import heapq
import json
import os
import resource
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic

from loadtest.attacks import ATTACKS, Answer, Attack, Step

SOURCES = tuple(f"127.0.0.{i}" for i in range(2, 10))  # the innocent client is at 127.0.0.1
BACK_OFF_S = 0.2  # before a connection is opened again
MAX_OPENED_PER_S = 500.0  # an attack on the server's limits, not a SYN flood
BIND_ADDRESS_NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: the port is chosen when the address of the peer is known
TURN_BYTES = 2**20  # sent on one connection before the others get a turn
RECEIVE_BYTES = 2**16
PREPARED = 8  # scripts whose requests are made before the attack begins; attacks have no more different ones


@dataclass
class Sent:
    """What an attack did.

    Attributes:
        connections: how many were opened.
        closed: how many of them the server closed, or refused.
        statuses: number of answers by status.
    """

    connections: int = 0
    closed: int = 0
    megabytes: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)


class _Connection:
    """One connection and how far its script is."""

    def __init__(self, number: int, script: Iterator[Step]) -> None:
        self.script = script
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.IPPROTO_IP, BIND_ADDRESS_NO_PORT, 1)
        self.socket.bind((SOURCES[number % len(SOURCES)], 0))
        self.number = number
        self.unsent = memoryview(b"")
        self.received = b""
        self.awaits_answer = False
        self.pauses = False


class Attacker:
    """Runs an attack's script on so many connections at once."""

    def __init__(self, attack: Attack, port: int, connections: int) -> None:
        self._attack, self._address = attack, ("127.0.0.1", port)
        self._epoll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._timers: list[tuple[float, int, int, _Connection | None]] = []  # when, tie, number, pausing
        self._ties = 0
        self.sent = Sent()
        self._next_open = monotonic()
        for number in range(connections):
            self._open_later(number)

    def run(self, seconds: float) -> Sent:
        """Attack for so many seconds."""
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
        """Open a connection in so many seconds, or when the rate of new ones allows it."""
        when = max(self._next_open, monotonic() + seconds)
        self._next_open = when + 1 / MAX_OPENED_PER_S
        self._at(when, number)

    def _at(self, when: float, number: int, pausing: _Connection | None = None) -> None:
        self._ties += 1
        heapq.heappush(self._timers, (when, self._ties, number, pausing))

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            _, _, number, pausing = heapq.heappop(self._timers)
            if pausing is None:
                self._connect(number)
            elif self._open.get(pausing.socket.fileno()) is pausing:
                pausing.pauses = False
                self._go_on(pausing)

    def _connect(self, number: int) -> None:
        try:
            connection = _Connection(number, self._attack.script(number))
            connection.socket.connect_ex(self._address)
        except OSError:  # no port, or no descriptor, is free
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
            self._again(connection, closed=True)
        elif events & select.EPOLLOUT:
            self._go_on(connection)

    def _again(self, connection: _Connection, closed: bool) -> None:
        """Close, and open a connection in its place a little later."""
        self.sent.closed += closed
        del self._open[connection.socket.fileno()]
        connection.socket.close()
        self._open_later(connection.number, BACK_OFF_S)

    def _receive(self, connection: _Connection) -> None:
        """Read what came, and go on after an answer that the script waits for."""
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._again(connection, closed=True)
            return
        connection.received += data
        while (status := _take_answer(connection)) is not None:
            self.sent.statuses[status] = self.sent.statuses.get(status, 0) + 1
            connection.awaits_answer = False
        if not connection.awaits_answer and not connection.unsent:
            self._go_on(connection)

    def _go_on(self, connection: _Connection) -> None:
        """Take the script's next steps until one has to wait."""
        turn = 0
        while not connection.awaits_answer and not connection.pauses:
            if connection.unsent:
                try:
                    count = connection.socket.send(connection.unsent[: TURN_BYTES - turn])
                except BlockingIOError:
                    count = 0
                except OSError:
                    self._again(connection, closed=True)
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
                    self._again(connection, closed=False)
                    return
                case bytes():
                    connection.unsent = memoryview(step)
                case Answer():
                    connection.awaits_answer = True
                case _:
                    connection.pauses = True
                    self._at(monotonic() + step, connection.number, connection)
        self._epoll.modify(connection.socket, self._mask())


def _take_answer(connection: _Connection) -> str | None:
    """The status of the first whole answer that was received, which is removed; None if there is none."""
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
    """Let the server and the innocent client run first."""
    os.nice(19)
    with suppress(OSError):  # where each session has a share of its own, nice counts only within one
        Path("/proc/self/autogroup").write_text("19")


def main(name: str, port: int, seconds: float, connections: int) -> None:
    """Say ready, run an attack by its name once a line comes in, and print what it did."""
    _be_nice()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack = ATTACKS[name]
    for number in range(min(connections, PREPARED)):
        next(attack.script(number))
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(asdict(Attacker(attack, port, connections).run(seconds))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
