"""Accepts the connections of a server, and passes each to the process with the fewest connections."""

import asyncio
import socket
from collections.abc import Sequence
from time import monotonic

from de3.server.http.http_server import BACKLOG
from de3.server.processes.group import Group

PAUSE_S = 0.005  # pause before accepting again when no process takes more connections
ACCEPT_S = 1.0  # time to pass on the last connections


class Connections:
    """The listening sockets of a server."""

    def __init__(self, group: Group, listening: Sequence[socket.socket]) -> None:
        """listening: bound sockets."""
        self._group, self._listening = group, listening
        self._held: socket.socket | None = None  # an accepted connection that no process has taken yet
        self._is_draining = False

    def start(self) -> None:
        """Listen, and accept connections from now on."""
        for sock in self._listening:
            sock.listen(BACKLOG)
            sock.setblocking(False)
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    async def drain(self) -> None:
        """Pass on the pending connections, for at most ACCEPT_S, then stop listening.

        An accepted connection that no process has taken by then is closed.
        """
        loop = asyncio.get_running_loop()
        self._is_draining = True
        end = monotonic() + ACCEPT_S
        while not all(self._accept(one) for one in self._listening) and monotonic() < end:
            await asyncio.sleep(PAUSE_S)
        for one in self._listening:
            loop.remove_reader(one)
            one.close()
        if self._held is not None:
            self._held.close()

    def _accept(self, listening: socket.socket) -> bool:
        """Accept connections and pass them on, until none is left or no process takes more.

        Returns True if no more can be accepted, usually because none is pending; False if more may be pending.
        """
        for _ in range(BACKLOG):
            try:
                client = self._held or listening.accept()[0]
            except OSError:  # none is pending, the client is gone, or no file descriptor is free
                return True
            self._held = None if self._pass_on(client) else client
            if self._held is not None:
                loop = asyncio.get_running_loop()
                loop.remove_reader(listening)
                loop.call_later(PAUSE_S, self._accept_again, listening)
                return False
            client.close()
        return False

    def _accept_again(self, listening: socket.socket) -> None:
        if not self._is_draining:
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)
            self._accept(listening)

    def _pass_on(self, client: socket.socket) -> bool:
        """Pass a connection to the process with the fewest connections; late ones last.

        Processes that still load get connections only if no process is ready. Returns False if no process takes it now.
        """
        takers = self._group.ready or [process for process in self._group.all if process.is_listening]
        takers.sort(key=lambda process: (process.is_late, process.connections))
        return any(process.take(client) for process in takers)
