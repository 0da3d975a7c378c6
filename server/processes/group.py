"""The processes of a server, as its supervisor sees them."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from de3.model_store.manifest import Manifest, fingerprint
from de3.runtime.choice import Standing
from de3.runtime.errors import RequestError
from de3.server.audit.report import Live
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.messages import decode
from de3.server.processes.receiver import CONNECTION, WEIGHTS, receive_fd
from de3.server.processes.samples import Family
from de3.server.processes.weights import Weights

log = logging.getLogger("de3")
# A process is killed if it does not answer a call in this many checks, one every CHECK_S: in general; while it loads
# models; and if only its event loop must answer ("sync"). Nothing blocks the event loop of a ready process for so long:
# a garbage collection, a fork or a large report takes far less than a second, even on a busy machine; a stalled disk,
# from which code is paged in, may take several. A load runs in other threads, but some of its steps hold the GIL, so it
# has more time. Checks are counted, not seconds, so a pause of the supervisor or of the whole machine does not count;
# nor does a pause of all processes that ends for all of them at about the same time.
CHECK_S = 1.0
ANSWER_CHECKS, LOAD_CHECKS, LOOP_CHECKS = 30, 300, 15


@dataclass(eq=False)
class Process:
    """A process, as the supervisor sees it.

    Attributes:
        number: its number, from 1; a process that replaces it has the same number.
        os_process: its multiprocessing.Process.
        sockets: socket that carries connections and weights, as file descriptors.
        channel: the channel to it.
        connections: number of its open connections.
        is_listening: it accepts connections.
        is_loaded: it has loaded the models.
        is_ready: it answers requests, or is about to.
        has_opened: it has been ready at least once.
        is_late: its event loop has not answered for at least CHECK_S.
        is_hung: it was killed because it did not answer.
        is_preparing: it loads models for a change.
        is_member: it takes part in changes of the models.
        reason: why it failed; empty if it did not fail, or gave no reason.
        samples: its metrics, as last read.
        reading: the last read of its metrics, which may still be running; None before the first.
    """

    number: int
    os_process: Any
    sockets: socket.socket
    channel: Channel = field(default_factory=Channel)
    connections: int = 0
    is_listening: bool = False
    is_loaded: bool = False
    is_ready: bool = False
    has_opened: bool = False
    is_late: bool = False
    is_hung: bool = False
    is_preparing: bool = False
    is_member: bool = False
    reason: str = ""
    samples: list[Family] = field(default_factory=list)
    reading: asyncio.Task[None] | None = None

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a handler of the process; returns its result. Kills the process if it does not answer in time.

        Raises RequestError if the handler fails, and ChannelClosedError if the process ends or is killed.
        """
        answer, checks = asyncio.ensure_future(self.channel.call(method, *arguments)), 0
        self.is_preparing |= method == "prepare"
        try:
            while checks < self._most_checks(method):
                await asyncio.wait([answer], timeout=CHECK_S)
                if answer.done():
                    return answer.result()
                checks += 1
        finally:
            answer.cancel()
            self.is_preparing &= method != "prepare"
        self.is_hung = True
        self.os_process.kill()  # before logging, which may block as well
        log.critical("process %d does not answer; killing it", self.number)
        raise ChannelClosedError("the process does not answer")

    def _most_checks(self, method: str) -> int:
        if method == "prepare" or (method == "sync" and (self.is_preparing or not self.is_ready)):
            return LOAD_CHECKS
        return LOOP_CHECKS if method == "sync" else ANSWER_CHECKS

    async def watch(self) -> None:
        """Kill the process once its event loop does not answer; returns when the process has ended or is killed."""
        with suppress(ChannelClosedError):
            while True:
                answer = asyncio.ensure_future(self.call("sync"))
                # Keeps asyncio from logging its error if the server stops: whoever ends the process reports it.
                answer.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                await asyncio.sleep(CHECK_S)
                self.is_late = not answer.done()
                await answer
                self.is_late = False

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Like call(), for changes of the models: raises RequestError even if the process ends."""
        try:
            return await self.call(method, *arguments)
        except ChannelClosedError:
            raise RequestError("a process ended during this change; try again", cause="conflict") from None

    def take(self, client: socket.socket) -> bool:
        """Give the process a connection; False if it cannot take one now."""
        try:
            socket.send_fds(self.sockets, [CONNECTION], [client.fileno()])
        except OSError:
            return False
        self.connections += 1
        return True

    def receive(self, weights: Weights) -> None:
        """Receive the process's messages about closed connections, and the weights that it has filled."""
        while True:
            try:
                data, fds = receive_fd(self.sockets)
            except OSError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(self.sockets)
                return
            if data[:1] != WEIGHTS:
                self.connections -= int(data[1:])
            elif fds:  # none if the supervisor had no free file descriptor
                weights.put(data[1:].decode(), fds[0])

    def close(self) -> None:
        """Give the process no more connections; it answers its requests, then ends."""
        with suppress(OSError):
            self.sockets.shutdown(socket.SHUT_WR)


class Group:
    """The running processes of a server."""

    def __init__(self, size: int) -> None:
        """size: number of processes when all are running."""
        self.size = size
        self._waits = True  # the first processes open together
        self.is_draining = False
        self._by_number: dict[int, Process] = {}

    def add(self, process: Process) -> None:
        """Add a process that has started."""
        self._by_number[process.number] = process
        if self.is_draining:
            process.channel.tell("drain")

    def remove(self, process: Process) -> None:
        """Remove a process that has ended."""
        del self._by_number[process.number]

    @property
    def all(self) -> list[Process]:
        """The running processes, including those that do not answer requests yet."""
        return list(self._by_number.values())

    @property
    def ready(self) -> list[Process]:
        """The processes that answer requests."""
        return [process for process in self.all if process.is_ready]

    @property
    def is_ready(self) -> bool:
        """True if a process answers requests."""
        return bool(self.ready)

    def loaded(self, process: Process) -> None:
        """Let a process that has loaded the models answer requests; the first processes once all have loaded them.

        Otherwise the first one to open would get all connections that are opened as soon as the server is ready.
        """
        process.is_loaded = True
        if not self._waits or sum(one.is_loaded for one in self.all) == self.size:
            self.open()

    def open(self) -> None:
        """Let the processes that have loaded the models answer requests."""
        self._waits = False
        for process in self.all:
            if process.is_loaded and not process.is_ready:
                process.is_ready = True
                process.channel.tell("open")

    def drain(self) -> None:
        """Have the processes report that they are not ready; they answer requests until they are closed."""
        self.is_draining = True
        for process in self.all:
            process.channel.tell("drain")

    def publish(self, manifest: Manifest, standing: Standing) -> None:
        """Send every process the standing of a model's ledger."""
        key = fingerprint(manifest)
        for process in self.all:
            process.channel.tell("standing", key, standing)

    async def live_of(self, name: str) -> list[Live]:
        """The state of a model's audits, name:version, in each process that audits it."""
        rows = await ask_all(self.ready, "live", name)
        return [decode(Live, row) for row in rows if row is not None]

    async def sync(self) -> None:
        """Wait until every process has handled what it was sent."""
        await ask_all(self.all, "sync")


async def ask_all(processes: Sequence[Process], method: str, *arguments: Any) -> list[Any]:
    """Call several processes; returns their answers, without those of processes that end before they answer.

    If a handler raises RequestError, the first such error is raised once all calls are finished.
    """
    calls = (process.call(method, *arguments) for process in processes)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, ChannelClosedError):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]
