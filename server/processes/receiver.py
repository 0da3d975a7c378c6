"""The connections and weights of a process, which the supervisor passes to it as file descriptors."""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress

from de3.native.network import Memory, can_share_memory
from de3.runtime.background import run_once

CONNECTION, WEIGHTS = b"c", b"w"  # first byte of the messages that carry a file descriptor
CLOSED = b"x"  # first byte of a message with the number of closed connections
FD_MESSAGE_BYTES = 256
ALL = 2**16  # messages to receive at once: more than a socket buffers
RETRY_S = 0.02


def receive_fd(sockets: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a message, and its file descriptor if it has one; raises OSError if there is none."""
    data, fds, _, _ = socket.recv_fds(sockets, FD_MESSAGE_BYTES, 1)
    for fd in fds:
        os.set_inheritable(fd, False)  # recv_fds ignores MSG_CMSG_CLOEXEC; a fit would keep the memory
    return data, fds


class Receiver:
    """Receives the connections and weights of a process; returns weights that the process has filled."""

    def __init__(self, sockets: socket.socket, on_end: Callable[[], None]) -> None:
        """sockets: carries the file descriptors. on_end: called when the supervisor sends no more connections."""
        self._sockets, self._on_end = sockets, on_end
        self._create: Callable[[], asyncio.Protocol]
        self._closed = 0  # closed connections not yet reported to the supervisor
        self._shares_weights = can_share_memory()
        self._weights: dict[str, int] = {}  # file descriptors of filled memory, by encoder hash
        self._new_weights: dict[str, int] = {}  # the same, for memory that this process fills

    def start(self) -> None:
        """Start receiving; called in the event loop."""
        self._sockets.setblocking(False)
        asyncio.get_running_loop().add_reader(self._sockets, self.receive)

    def stop(self) -> None:
        """Stop receiving; called in the event loop."""
        asyncio.get_running_loop().remove_reader(self._sockets)

    def receive(self, most: int = 16) -> None:
        """Receive the messages that have arrived, at most this many."""
        for _ in range(most):
            try:
                data, fds = receive_fd(self._sockets)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            if not data:
                self._on_end()
                return
            if not fds:  # this process had no free file descriptor for it
                if data[:1] == CONNECTION:
                    self.closed()
            elif data[:1] == WEIGHTS:
                self._weights[data[1:].decode()] = fds[0]
            else:
                run_once("connection", self._connect(socket.socket(fileno=fds[0])))

    # Connections

    def listen(self, create: Callable[[], asyncio.Protocol]) -> None:
        """Serve the connections that arrive. create: makes the protocol of one."""
        self._create = create

    async def _connect(self, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(self._create, sock)
        except BaseException as error:
            sock.close()
            self.closed()
            if not isinstance(error, OSError):  # the client is gone
                raise

    def closed(self) -> None:
        """Tell the supervisor that a connection was closed."""
        self._closed += 1
        if self._closed == 1:
            asyncio.get_running_loop().call_soon(self._tell_closed)

    def _tell_closed(self) -> None:
        try:
            self._sockets.send(CLOSED + b"%d" % self._closed)
        except BlockingIOError:  # the supervisor is busy
            asyncio.get_running_loop().call_later(RETRY_S, self._tell_closed)
        except OSError:  # it has ended
            return
        else:
            self._closed = 0

    # Weights

    def memory_of(self, key: str) -> Memory | None:
        """Memory for the weights of the encoder with this hash, which another process may have filled.

        None if memory cannot be shared.
        """
        if not self._shares_weights:
            return None
        if (fd := self._weights.get(key)) is not None:
            return Memory(fd, True)
        fd = self._new_weights[key] = os.memfd_create("de3-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return Memory(fd, False)

    def release_weights(self, are_filled: bool = True) -> None:
        """Send newly filled memory to the supervisor, then close all memory of weights; the kernels have mapped it.

        are_filled: the new memory was filled; False: loading failed.
        """
        for key, fd in self._new_weights.items() if are_filled else ():
            with suppress(OSError):  # if that fails, each process fills its own
                socket.send_fds(self._sockets, [WEIGHTS + key.encode()], [fd])
        for fd in (*self._new_weights.values(), *self._weights.values()):
            os.close(fd)
        self._new_weights, self._weights = {}, {}
