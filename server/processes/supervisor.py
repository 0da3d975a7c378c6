"""The supervisor of a server of several processes: it accepts connections, and has what the processes share.

It loads no model. Each connection goes to the process with the fewest. A process that ends is replaced; its own
requests are all that is lost. Changes of the models are prepared by every process, then committed by every process.
"""

import asyncio
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from statistics import mean
from time import monotonic, perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import uvloop
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact, Store
from de3.server.audit.ledger import Audited, Ledger, Settled, Standing, tau_row
from de3.server.audit.ledgers import Ledgers
from de3.server.audit.log import AuditLog
from de3.server.audit.report import Live
from de3.server.audit.state import fingerprint
from de3.server.errors import RequestError
from de3.server.http.access import Access
from de3.server.http.http_server import BACKLOG
from de3.server.http.shared_run import SharedRun
from de3.server.metrics import LedgerMetrics
from de3.server.models import find
from de3.server.processes import worker
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.samples import Family, families_from, families_of, growing, merged, text_of
from de3.server.processes.worker import (
    CONNECTION,
    FD_MESSAGE_BYTES,
    WEIGHTS,
    artifact_of,
    part_of,
)
from de3.server.rules import Choice, Rules
from de3.server.settings import Settings

log = logging.getLogger("de3")
MAX_STARTS = 3  # of a process that ends before it is ready, after which the server stops
MAX_ENDS, ENDS_S = 5, 10.0  # ready processes that end within this time, after which the server stops
SAMPLES_S = 5.0  # time for a process to send its metrics
KEEP_S = 0.5  # interval at which the counters of the processes are kept: a killed one loses those since
ANSWER_S, LOAD_S = 30.0, 300.0  # time for a process to answer, and to load a model; then it is killed
RETRY_S = 30.0  # longest pause before a process that failed to start is started again
ACCEPT_S = 1.0  # time to pass on the last connections
PAUSE_S = 0.005  # before connections are accepted again, when no process takes more
STOP_S = 10.0  # time to end a process after its last request


class ServerError(Exception):
    """The server cannot go on; logged already."""


@dataclass(eq=False)
class Process:
    """A process, as the supervisor sees it.

    Attributes:
        number: from 1; its replacement has the same.
        sockets: carries connections and weights.
        connections: number of open ones.
        is_listening, is_member, is_ready: it takes connections; it takes part in changes of the models; it answers.
        has_opened: it has been ready.
        models: those that it has loaded.
        reason: why it failed, if it said so.
        samples: its metrics when they were last read.
    """

    number: int
    os_process: Any
    channel: Channel
    sockets: socket.socket
    connections: int = 0
    is_listening: bool = False
    is_ready: bool = False
    has_opened: bool = False
    is_member: bool = False
    models: list[Any] = field(default_factory=list)
    reason: str = ""
    samples: list[Family] = field(default_factory=list)


class Supervisor:
    """Runs the processes of a server."""

    def __init__(
        self, settings: Settings, artifacts: Sequence[Artifact], listening: list[socket.socket]
    ) -> None:
        """listening: bound sockets. Raises StoreError or ValueError for wrong settings."""
        self._settings, self._artifacts, self._listening = settings, artifacts, listening
        find(Store(settings.store), settings.models, artifacts)  # fails early, as a service does
        self._access = Access(settings)
        self._part = part_of(settings, settings.processes)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", worker.__name__])
        self._processes: dict[int, Process] = {}
        # Starts of each process since it was last ready.
        self._starts = dict.fromkeys(range(1, settings.processes + 1), 0)
        self._ends: deque[float] = deque(maxlen=MAX_ENDS)
        self._departed: list[Family] = []  # counters of processes that have ended
        # Models and their roles; None until the first process has loaded them.
        self._state: dict[str, Any] | None = None
        self._version = 0  # of the state
        self._changing = asyncio.Lock()
        self._is_changing = False
        self._sampled_at = 0.0
        self._held: socket.socket | None = None  # an accepted connection that no process takes yet
        self._scraping = SharedRun[str]("the metrics", settings.processes)
        self._reporting: WeakKeyDictionary[Ledger, SharedRun[dict[str, Any]]] = WeakKeyDictionary()
        self._weights: dict[str, int] = {}  # file descriptors
        self._ledgers = Ledgers(settings, self._publish)
        self._log = None if settings.log_audits is None else AuditLog(settings.log_audits)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lives: dict[int, asyncio.Task[None]] = {}  # from the start of a process to its end
        self._over: asyncio.Future[Exception | None]
        self._started = 0.0
        self._is_draining = False
        self._metrics()

    def _metrics(self) -> None:
        self._registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        Gauge("de3_processes", "Processes that serve models (--processes)", registry=r).set(
            self._settings.processes
        )
        self._replaced = Counter(
            "de3_replaced_processes", "Processes that ended and were replaced", registry=r
        )
        if self._settings.share_of_audits:
            r.register(LedgerMetrics(lambda: self._ledgers.all, self._in_force))

    def _in_force(self, ledger: Ledger) -> Choice:
        level = max((_gauge(p.samples, "de3_load_level") for p in self._all), default=0.0)
        return ledger.rules.in_force(int(level))

    # Life

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; raises StoreError, ValueError or ServerError if the server cannot go on."""
        loop = asyncio.get_running_loop()
        self._over, started = loop.create_future(), perf_counter()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, self._signalled)
        self._started = started
        for sock in self._listening:
            sock.listen(BACKLOG)
            sock.setblocking(False)
            loop.add_reader(sock, self._accept, sock)
        self._ledgers.start()
        host, port = self._listening[0].getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        logging.getLogger("uvicorn.error").info(
            "Uvicorn running on http://%s:%d (Press CTRL+C to quit)", address, port
        )
        for number in self._starts:
            self._lives[number] = self._spawn(self._start(number))
        self._spawn(self._keep_samples())
        failure = await self._over
        await self._drain()
        if failure is not None:
            raise failure

    def _spawn(self, running: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(running)
        self._tasks.add(task)
        task.add_done_callback(self._ended_task)
        return task

    def _ended_task(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor failed", exc_info=error)
            self._stop(ServerError(str(error)))

    def _signalled(self) -> None:
        if self._over.done():  # the second signal
            for process in self._all:
                process.os_process.kill()
        self._stop(None)

    def _stop(self, failure: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(failure)

    async def _drain(self) -> None:
        """Let the processes answer the accepted requests, and wait until they have ended."""
        loop = asyncio.get_running_loop()
        self._is_draining = True
        end = monotonic() + ACCEPT_S
        while not all(self._accept(one) for one in self._listening) and monotonic() < end:
            await asyncio.sleep(PAUSE_S)
        for one in self._listening:
            loop.remove_reader(one)
            one.close()
        for process in self._all:
            with suppress(OSError):
                process.sockets.shutdown(socket.SHUT_WR)
        # Their channels end with them; the last settled texts have then been counted.
        lives = list(self._lives.values())
        if lives:
            await asyncio.wait(lives, timeout=self._settings.timeout_s + 5 + STOP_S)
        for process in self._all:
            log.error("process %d does not end: it is killed", process.number)
            process.os_process.kill()
        await asyncio.to_thread(self._ledgers.stop)
        if self._log is not None:
            self._log.close()

    @property
    def _all(self) -> list[Process]:
        return list(self._processes.values())

    @property
    def _ready(self) -> list[Process]:
        return [process for process in self._all if process.is_ready]

    # Processes

    async def _start(self, number: int, pause_s: float = 0.0) -> None:
        """Start a process after a pause, and replace it when it ends."""
        loop = asyncio.get_running_loop()
        end = monotonic() + pause_s
        while monotonic() < end and not self._is_draining:
            await asyncio.sleep(0.1)
        if self._is_draining:
            return
        control, its_control = socket.socketpair()
        sockets, its_sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = (number, self._part, self._artifacts, its_control, its_sockets)
        os_process: Any = self._context.Process(target=worker.main, args=arguments, daemon=True)
        try:
            await asyncio.to_thread(os_process.start)
        except (OSError, EOFError) as error:  # no memory, or too many processes
            for one in (control, sockets):
                one.close()
            self._failed(number, f"it cannot be started: {error}")
            return
        finally:
            its_control.close()
            its_sockets.close()
        sockets.setblocking(False)
        process = Process(number, os_process, Channel({}), sockets)
        process.channel = Channel(self._handlers(process))
        self._processes[number] = process
        loop.add_reader(sockets, self._receive, process)
        if self._is_draining:
            sockets.shutdown(socket.SHUT_WR)
        ended = asyncio.Event()
        loop.add_reader(os_process.sentinel, ended.set)
        running = asyncio.ensure_future(process.channel.run(control))
        await ended.wait()
        loop.remove_reader(os_process.sentinel)
        await running  # its last messages
        await asyncio.to_thread(os_process.join)
        self._gone(process)

    def _gone(self, process: Process) -> None:
        loop = asyncio.get_running_loop()
        number, code = process.number, process.os_process.exitcode
        loop.remove_reader(process.sockets)
        process.sockets.close()
        self._departed = merged([self._departed, growing(process.samples)])
        del self._processes[number]
        self._tell_ready()
        if self._is_draining or self._over.done():
            return
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with {code}"
        reason = process.reason or f"it ended {how}"
        if self._state is None and process.reason:  # the models cannot be served
            self._stop(ValueError(reason))
            return
        if process.has_opened:
            self._ends.append(monotonic())
        self._failed(number, reason)

    def _failed(self, number: int, reason: str) -> None:
        """Replace a process, or stop the server if processes end again and again.

        While others are ready, one that cannot start is tried again, after longer and longer pauses.
        """
        self._starts[number] += 1
        starts = self._starts[number]
        is_loop = len(self._ends) == MAX_ENDS and monotonic() - self._ends[0] < ENDS_S
        if is_loop or (starts > MAX_STARTS and not self._ready):
            log.critical("process %d ended again and again: %s: the server stops", number, reason)
            self._stop(ServerError(reason))
            return
        log.critical("process %d ended: %s: it is replaced", number, reason)
        self._replaced.inc()
        pause_s = 0.0 if starts <= MAX_STARTS else min(RETRY_S, 2.0 ** (starts - MAX_STARTS))
        self._lives[number] = self._spawn(self._start(number, pause_s))

    def _handlers(self, process: Process) -> dict[str, Callable[..., Any]]:
        def running() -> None:
            self._spawn(self._load_or_end(process))

        def listening() -> None:
            process.is_listening = True

        def leaving() -> None:
            process.is_listening = process.is_ready = False
            with suppress(OSError):
                process.sockets.shutdown(socket.SHUT_WR)
            self._tell_ready()

        def ready() -> None:
            process.is_ready = process.has_opened = True
            self._starts[process.number] = 0
            self._tell_ready()
            if len(self._ready) == self._settings.processes:
                log.info(
                    "ready in %.1f s: %d processes, %d engine threads each",
                    *(perf_counter() - self._started, self._settings.processes, self._part.threads),
                )

        return {
            "running": running,
            "listening": listening,
            "leaving": leaving,
            "sync": lambda: None,
            "ready": ready,
            "scrape": lambda: self._scraping.result(self._scrape),
            "change": self._change,
            "lease": self._lease,
            "charge": self._charge,
            "count": self._count,
            "audit_line": self._write,
            "report": self._report,
            "reset": self._reset,
        }

    def _tell_ready(self) -> None:
        is_ready = len(self._ready) == self._settings.processes
        for process in self._all:
            process.channel.tell("all_ready", is_ready)

    # Connections

    def _accept(self, listening: socket.socket) -> bool:
        """Accept connections, and pass them on until no process takes more; false if others wait."""
        for _ in range(BACKLOG):
            try:
                client = self._held or listening.accept()[0]
            except OSError:  # none is pending, or the client is gone, or there are no file descriptors
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
        """Give a connection to the process with the fewest; false if none takes it now."""
        takers = [process for process in self._all if process.is_listening]
        for process in sorted(takers, key=lambda p: (not p.is_ready, p.connections)):
            with suppress(OSError):
                socket.send_fds(process.sockets, [CONNECTION], [client.fileno()])
                process.connections += 1
                return True
        return False

    def _receive(self, process: Process) -> None:
        """Messages about closed connections, and filled weights."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(process.sockets, FD_MESSAGE_BYTES, 1)
            except OSError:
                return
            if not data:
                asyncio.get_running_loop().remove_reader(process.sockets)
                return
            if data[:1] == WEIGHTS:
                key = data[1:].decode()
                if (old := self._weights.pop(key, None)) is not None:
                    os.close(old)
                self._weights[key] = fds[0]
            else:
                process.connections -= int(data[1:])

    # Models

    async def _load(self, process: Process) -> None:
        """Have a new process load the models: the first one finds and proves them, the others follow it."""
        while True:
            if self._state is None:
                async with self._changing:
                    if self._state is None:
                        answer = await process.channel.call("load", None)
                        if not self._loaded(process, answer):
                            return
                        self._begin(answer)
            version = self._version
            if not process.models:
                self._send_weights(process, [plan["artifact"] for plan in self._plans()])
                answer = await process.channel.call("load", [self._plans(), self._routes()])
                if not self._loaded(process, answer):
                    return
            async with self._changing:
                if version == self._version:
                    for ledger in self._ledgers.all:
                        process.channel.tell("standing", fingerprint(ledger.manifest), *ledger.standing)
                    process.channel.tell("open")
                    process.is_member = True
                    return
            process.models = []  # they have changed in the meantime

    async def _load_or_end(self, process: Process) -> None:
        try:
            await self._load(process)
        except ChannelClosedError:
            return
        except Exception as error:
            if self._over.done():
                return
            log.exception("process %d cannot be used", process.number)
            process.reason = str(error)
            process.os_process.kill()

    def _loaded(self, process: Process, answer: dict[str, Any]) -> bool:
        """Note what a process has loaded; false if it failed, and ends."""
        self._receive(process)  # the weights that it has sent before
        process.reason = answer.get("failed", "")
        process.models = answer.get("models", [])
        return not process.reason

    def _begin(self, state: dict[str, Any]) -> None:
        """Take over the models that the first process has loaded."""
        self._set_state(state)
        for model in state["models"]:
            self._open_ledger(model)

    def _set_state(self, state: dict[str, Any]) -> None:
        self._state = state
        self._version += 1
        self._forget_weights()

    def _forget_weights(self) -> None:
        """Close the memory of models that are not served; processes that still use it have mapped it."""
        keys = {fingerprint(artifact_of(plan["artifact"]).manifest) for plan in self._plans()}
        for key in self._weights.keys() - keys:
            os.close(self._weights.pop(key))

    def _routes(self) -> dict[str, Any]:
        assert self._state is not None
        routes: dict[str, Any] = self._state["routes"]
        return routes

    def _plans(self) -> list[dict[str, Any]]:
        assert self._state is not None
        return [model["plan"] for model in self._state["models"]]

    def _open_ledger(self, model: dict[str, Any]) -> None:
        if self._settings.share_of_audits:
            artifact = artifact_of(model["plan"]["artifact"])
            rules = Rules(artifact.manifest, self._settings)
            self._ledgers.serve(artifact.manifest, rules, model["runtime"], model["caution"])

    def _send_weights(self, process: Process, artifacts: Sequence[Any]) -> None:
        for row in artifacts:
            key = fingerprint(artifact_of(row).manifest)
            if (fd := self._weights.get(key)) is not None:
                with suppress(OSError):  # it has ended, or then has its own
                    socket.send_fds(process.sockets, [WEIGHTS + key.encode()], [fd])

    async def _change(self, change: dict[str, Any]) -> dict[str, Any]:
        """Change the models of all processes, or of none; raises RequestError."""
        if self._is_changing:
            raise RequestError("another change of the models is in progress; try again", cause="conflict")
        self._is_changing = True
        try:
            async with self._changing:
                return await self._change_all(change)
        finally:
            self._is_changing = False

    async def _change_all(self, change: dict[str, Any]) -> dict[str, Any]:
        members = [process for process in self._all if process.is_member]
        if not members:
            raise RequestError("the models are still loading", cause="loading", retry_after_s=1)
        first = members[0]
        plan = await self._ask(first, "plan", change)
        try:
            loaded = await self._ask(first, "prepare", plan)
            self._receive(first)  # its weights
            plan["no_kernels"] = loaded["no_kernels"]
            for process in members[1:]:
                self._send_weights(process, [plan["artifact"]] if plan["artifact"] else [])
            await self._ask_all(members[1:], "prepare", plan)
        except Exception:
            await self._ask_all(members, "abort")
            self._forget_weights()
            raise
        if plan["artifact"]:
            self._open_ledger({**loaded, "plan": plan})
        answers = await self._commit_all(members)
        states = await self._ask_all(members, "state")
        if states:
            self._set_state(states[0])
        assert self._state is not None
        names = {model["full_name"] for model in self._state["models"]}
        for ledger in self._ledgers.all:
            if ledger.full_name not in names:
                self._ledgers.forget(ledger.full_name)
        if not answers:
            raise RequestError("every process ended during this change; try again", cause="conflict")
        return answers[0]

    async def _commit_all(self, members: Sequence[Process]) -> list[dict[str, Any]]:
        """Commit in every process; one that cannot is replaced, as the others have changed."""
        calls = (self._call(process, "commit") for process in members)
        answers = []
        for process, answer in zip(
            members, await asyncio.gather(*calls, return_exceptions=True), strict=True
        ):
            if isinstance(answer, dict):
                answers.append(answer)
            else:
                process.os_process.kill()
        return answers

    async def _call(self, process: Process, method: str, *arguments: Any) -> Any:
        """Call a process, and kill it if it does not answer; raises its RequestError, or ChannelClosedError."""
        limit_s = LOAD_S if method == "prepare" else ANSWER_S
        try:
            async with asyncio.timeout(limit_s):
                return await process.channel.call(method, *arguments)
        except TimeoutError:
            log.critical("process %d does not answer: it is killed", process.number)
            process.os_process.kill()
            raise ChannelClosedError("the process does not answer") from None

    async def _ask(self, process: Process, method: str, *arguments: Any) -> Any:
        """Call one process; raises RequestError if it ends."""
        try:
            return await self._call(process, method, *arguments)
        except ChannelClosedError:
            raise RequestError("a process ended during this change; try again", cause="conflict") from None

    async def _ask_all(self, processes: Sequence[Process], method: str, *arguments: Any) -> list[Any]:
        """The answers of processes, without those that end; raises the first RequestError, once all have answered."""
        calls = (self._call(process, method, *arguments) for process in processes)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ChannelClosedError):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    # Rate limits

    def _lease(self, owner: str, texts: int) -> int:
        assert self._access.limit is not None
        return self._access.limit.grant(owner, texts)

    def _charge(self, owner: str, texts: int) -> None:
        if self._access.limit is not None:
            self._access.limit.drain(owner, texts)

    # Audits

    def _publish(self, manifest: Manifest, standing: Standing) -> None:
        key = fingerprint(manifest)
        for process in self._all:
            process.channel.tell("standing", key, *standing)

    def _count(self, name: str, rows: list[dict[str, Any]], epoch: int, may_rise: bool) -> None:
        settled = [
            Settled(**{**row, "audit": None if row["audit"] is None else Audited(**row["audit"])})
            for row in rows
        ]
        self._ledgers.count(name, settled, epoch, may_rise)

    def _write(self, line: str) -> None:
        if self._log is not None:
            self._log.write(line)

    def _ledger(self, name: str) -> Ledger:
        ledger = self._ledgers.get(name)
        if ledger is None:
            raise RequestError(f"{name} is no longer served", "name", "unknown_model")
        return ledger

    async def _report(self, name: str, level: int) -> dict[str, Any]:
        ledger = self._ledger(name)
        running = self._reporting.setdefault(ledger, SharedRun("the report", self._settings.processes))
        return await running.result(lambda: self._make_report(ledger, level))

    async def _make_report(self, ledger: Ledger, level: int) -> dict[str, Any]:
        name = ledger.full_name
        rows = [Live(*row) for row in await self._ask_all(self._ready, "live", name) if row]
        excluded = {
            reason: sum(row.excluded[reason] for row in rows) for reason in (rows[0].excluded if rows else ())
        }
        share = mean(row.share for row in rows) if rows else 0.0
        live = Live(share, sum(row.pending for row in rows), excluded)
        return await self._ledgers.report(name, live, ledger.rules.in_force(level))

    async def _reset(self, name: str) -> dict[str, Any]:
        ledger = self._ledger(name)
        ledger.reset()
        await self._ask_all(self._all, "sync")  # they have the new standing
        return tau_row(ledger.rules.default)

    # Metrics

    async def _read_samples(self) -> None:
        async def read(process: Process) -> None:
            with suppress(TimeoutError, ChannelClosedError, RequestError):
                async with asyncio.timeout(SAMPLES_S):
                    process.samples = families_from(await process.channel.call("samples"))

        await asyncio.gather(*(read(process) for process in self._all if process.is_listening))

    async def _keep_samples(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            if monotonic() - self._sampled_at > KEEP_S / 2:
                await self._read_samples()

    async def _scrape(self) -> str:
        await self._read_samples()
        self._sampled_at = monotonic()
        parts = [process.samples for process in self._all]
        text = await asyncio.to_thread(self._text, [families_of(self._registry), self._departed, *parts])
        return text.decode()

    def _text(self, parts: list[list[Family]]) -> bytes:
        return text_of(merged(parts))


def _gauge(samples: Sequence[Family], name: str) -> float:
    return next((value for f in samples if f.name == name for _, _, value in f.samples), 0.0)


def supervise(settings: Settings, artifacts: Sequence[Artifact], listening: list[socket.socket]) -> None:
    """Run a server of several processes until SIGTERM or SIGINT; see Supervisor."""
    supervisor = Supervisor(settings, artifacts, listening)
    uvloop.run(supervisor.run())
