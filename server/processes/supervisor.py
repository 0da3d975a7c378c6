"""The supervisor of a server of several processes: it accepts connections, and holds the processes' shared state.

It loads no model. Each connection goes to the process with the fewest connections. A process that ends is replaced;
only its own requests are lost. Changes of the models are prepared by every process, then committed by every process.
"""

import asyncio
import logging
import signal
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from time import monotonic, perf_counter
from typing import Any

from de3.model_store.store import Artifact, Store
from de3.runtime.background import keep_running, report, report_unhandled, run_once
from de3.runtime.child import ignore_working_directory
from de3.server.http.access import Access
from de3.server.http.http_server import hint, say_draining, say_ready, stop_signals, url_of
from de3.server.models import default_of, find
from de3.server.processes import worker
from de3.server.processes.channel import ChannelClosedError, Handler
from de3.server.processes.connections import Connections
from de3.server.processes.group import Group, Process
from de3.server.processes.metrics import SharedMetrics
from de3.server.processes.models import SharedModels
from de3.server.processes.weights import Weights
from de3.server.settings import Settings

log = logging.getLogger("de3")
MAX_STARTS = 3  # more failed starts in a row than this stop the server, unless another process is ready
MAX_ENDS, ENDS_S = 5, 10.0  # the server stops if this many ready processes end within this time
RETRY_S = 30.0  # longest pause before a process that failed to start is started again
STOP_S = 10.0  # time for a process to end after its last request


class ServerError(Exception):
    """The server cannot continue; the reason is already logged."""


class Supervisor:
    """Runs the processes of a server."""

    def __init__(self, settings: Settings, artifacts: Sequence[Artifact]) -> None:
        """artifacts: see Service.

        Raises StoreError as find() does, and ValueError for a setting that cannot be met.
        """
        self._settings, self._artifacts = settings, artifacts
        found = find(Store(settings.store, settings.state_dir), settings.models, artifacts)  # raises early
        self._default = default_of(settings, found, bool(settings.models or artifacts))
        self._access = Access(settings)
        # A process that is started later has the same keys, even if the files have changed.
        self._part = worker.part_of(settings, settings.processes).model_copy(update=self._access.keys)
        ignore_working_directory()
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", worker.__name__])
        self._group, self._weights = Group(settings.processes), Weights()
        self._models = SharedModels(settings, self._group, self._weights)
        self._coordinator = self._models.coordinator
        self._metrics = SharedMetrics(self._group, self._coordinator, settings)
        # By process number: times that the process has ended or failed to start since it was last ready.
        self._starts = dict.fromkeys(range(1, settings.processes + 1), 0)
        self._ends: deque[float] = deque(maxlen=MAX_ENDS)
        self._lives: dict[int, asyncio.Task[None]] = {}  # by number; each task ends with its process
        self._over: asyncio.Future[Exception | None]
        self._connections: Connections
        self._url = ""
        self._started = 0.0
        self._ended: dict[
            int, float
        ] = {}  # by number, of processes that are being replaced: when the first ended
        self._has_opened = self._was_complete = self._is_draining = False

    async def run(self, listening: Sequence[socket.socket]) -> None:
        """Serve until SIGTERM, SIGINT or SIGHUP. listening: bound sockets.

        Raises ValueError if the models cannot be loaded at startup, and ServerError if the server cannot continue for
        another reason.
        """
        loop = asyncio.get_running_loop()
        self._over, self._started = loop.create_future(), perf_counter()
        report_unhandled(loop)
        for one in stop_signals():
            loop.add_signal_handler(one, self._signalled)
        self._connections, self._url = Connections(self._group, listening), url_of(listening[0])
        self._connections.start()
        self._coordinator.start()
        host, port = listening[0].getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logging.getLogger("uvicorn.error").info(
            "Uvicorn running on http://%s:%d (Press CTRL+C to quit)", address, port
        )
        for number in self._starts:
            self._begin_life(number)
        keep_running("reading_metrics", self._metrics.keep)
        failure = await self._over
        await self._drain()
        if failure is not None:
            raise failure

    def _signalled(self) -> None:
        """Start to drain, and stop after drain_s; at the next signal, stop at once; at a third, kill the processes."""
        if self._over.done():
            for process in self._group.all:
                process.os_process.kill()
        elif self._group.is_ready and not self._group.is_draining:
            self._group.drain()
            say_draining(self._settings.drain_s)
            asyncio.get_running_loop().call_later(self._settings.drain_s, self._stop, None)
        else:
            self._stop(None)

    def _stop(self, failure: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(failure)

    async def _drain(self) -> None:
        """Let the processes answer the accepted requests, and wait until they have ended; kill those that do not."""
        self._is_draining = True
        await self._connections.drain()
        for process in self._group.all:
            process.close()
        # The channel of a process ends with it; its last settled texts have then been counted.
        if lives := list(self._lives.values()):
            await asyncio.wait(lives, timeout=self._settings.timeout_s + 5 + STOP_S)
        for process in self._group.all:
            log.error("process %d does not end; killing it", process.number)
            process.os_process.kill()
        await asyncio.to_thread(self._coordinator.stop)

    # The life of a process

    def _begin_life(self, number: int, pause_s: float = 0.0) -> None:
        self._lives[number] = run_once("process", self._live(number, pause_s))

    async def _live(self, number: int, pause_s: float) -> None:
        """Start a process after a pause, and replace it when it ends."""
        try:
            await self._start_and_watch(number, pause_s)
        except Exception as error:
            report("process", error)
            if not (self._is_draining or self._over.done()):
                self._failed(number, f"the supervisor failed: {error}")

    async def _start_and_watch(self, number: int, pause_s: float) -> None:
        loop = asyncio.get_running_loop()
        end = monotonic() + pause_s
        while monotonic() < end and not self._is_draining:
            await asyncio.sleep(0.1)
        if self._is_draining:
            return
        try:
            os_process, control, sockets = await self._start(number)
        except (OSError, EOFError) as error:  # no memory, too many processes, or too many open files
            self._failed(number, f"it cannot be started: {error}")
            return
        process = Process(number, os_process, sockets)
        self._group.add(process)
        run_once("process", process.watch())
        loop.add_reader(sockets, process.receive, self._weights)
        if self._is_draining:
            process.close()
        try:
            await _end_of(process, control, self._handlers(process))
        except Exception as error:  # its messages cannot be read
            report("process", error)
            os_process.kill()
        await asyncio.to_thread(os_process.join)
        self._gone(process)

    async def _start(self, number: int) -> tuple[Any, socket.socket, socket.socket]:
        """Start a process; returns it, and our ends of the sockets for its channel and its connections.

        Raises OSError or EOFError if that is not possible.
        """
        with ExitStack() as stack:
            control, its_control = map(stack.enter_context, socket.socketpair())
            sockets, its_sockets = map(
                stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            )
            sockets.setblocking(False)
            arguments = (number, self._part, self._artifacts, its_control, its_sockets)
            os_process: Any = self._context.Process(target=worker.main, args=arguments, daemon=True)
            await asyncio.to_thread(os_process.start)
            its_control.close()
            its_sockets.close()
            stack.pop_all()
        return os_process, control, sockets

    async def _load(self, process: Process) -> None:
        try:
            await self._models.load(process)
        except ChannelClosedError:
            return
        except Exception as error:
            if self._over.done():
                return
            log.exception("process %d failed to load the models; killing it", process.number)
            process.reason = str(error)
            process.os_process.kill()

    def _gone(self, process: Process) -> None:
        number, code = process.number, process.os_process.exitcode
        asyncio.get_running_loop().remove_reader(process.sockets)
        process.sockets.close()
        self._metrics.remove(process)
        self._group.remove(process)
        if self._is_draining or self._over.done():
            return
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        reason = process.reason or f"it ended {how}"
        if process.reason and not self._models.are_loaded:  # the models cannot be served
            self._stop(ValueError(reason))
            return
        if process.has_opened and not process.is_hung:  # a stall of the machine may stop all of them at once
            self._ends.append(monotonic())
        self._failed(number, reason)

    def _failed(self, number: int, reason: str) -> None:
        """Replace a process, or stop the server if processes end repeatedly.

        While others are ready, a process that cannot start is started again, after increasing pauses.
        """
        self._starts[number] += 1
        starts = self._starts[number]
        is_loop = len(self._ends) == MAX_ENDS and monotonic() - self._ends[0] < ENDS_S
        if is_loop or (starts > MAX_STARTS and not self._group.ready):
            log.critical(
                "processes keep exiting, most recently process %d (%s); stopping the server", number, reason
            )
            self._stop(ServerError(reason))
            return
        log.critical("process %d ended (%s); replacing it", number, reason)
        self._ended.setdefault(number, perf_counter())
        self._group.open()  # the others do not wait for it
        self._metrics.replaced.inc()
        pause_s = 0.0 if starts <= MAX_STARTS else min(RETRY_S, 2.0 ** (starts - MAX_STARTS))
        self._begin_life(number, pause_s)

    def _handlers(self, process: Process) -> dict[str, Handler]:
        limit = self._access.limit

        def listening() -> None:
            process.is_listening = True

        def leaving() -> None:
            process.is_listening = process.is_ready = False
            process.close()

        def ready() -> None:
            if not self._has_opened and self._models.are_loaded:
                self._has_opened = True
                say_ready(hint(self._url, self._models.manifests, self._default, self._settings.has_keys))
            process.has_opened = True
            self._starts[process.number] = 0
            if (ended := self._ended.pop(process.number, None)) is not None:
                log.info("process %d is replaced, after %.1f s", process.number, perf_counter() - ended)
            complete = sum(one.has_opened for one in self._group.ready) == self._group.size
            if complete and not self._was_complete:
                self._was_complete = True
                log.info(
                    "ready in %.1f s: %d processes, engine threads of each: %d",
                    *(perf_counter() - self._started, self._group.size, self._part.threads),
                )

        return {
            "running": lambda: run_once("process_loading", self._load(process)),
            "listening": listening,
            "leaving": leaving,
            "is_ready": lambda: self._group.is_ready,
            "sync": lambda: None,
            "ready": ready,
            "scrape": self._metrics.scrape,
            "change": self._models.change,
            "count": self._coordinator.count,
            "learn": self._coordinator.learn,
            "learning": self._coordinator.learning,
            "report": self._coordinator.report,
            "reset": self._coordinator.reset,
            "ask_upstream": self._coordinator.upstreams.ask,
            "answered": self._coordinator.upstreams.answered,
            **({} if limit is None else {"lease": limit.hit, "charge": limit.drain}),
        }


async def _end_of(process: Process, control: socket.socket, handlers: dict[str, Handler]) -> None:
    """Run the channel of a process until the process has ended; raises an error if its messages cannot be read."""
    loop = asyncio.get_running_loop()
    running, ended = asyncio.ensure_future(process.channel.run(control, handlers)), asyncio.Event()
    waiting = asyncio.ensure_future(ended.wait())
    sentinel = process.os_process.sentinel
    loop.add_reader(sentinel, ended.set)
    try:
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            process.is_listening = process.is_ready = False
        await waiting
    finally:
        waiting.cancel()
        loop.remove_reader(sentinel)
    await running  # until its last messages are handled
