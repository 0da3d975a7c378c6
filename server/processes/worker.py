"""A supervisor's worker process: it runs the HTTP server and the engine, but does not listen for connections."""

import asyncio
import logging
import random
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from types import FrameType
from typing import Any

from de3.model_store.manifest import Manifest
from de3.model_store.store import Artifact
from de3.runtime.background import report, run_once
from de3.runtime.choice import Standing
from de3.server import logs, memory
from de3.server.http.http_server import HttpServer, max_connections, stop_signals, uvicorn_config
from de3.server.manager import Manager, Plan
from de3.server.models import Route
from de3.server.processes.channel import Channel, ChannelClosedError, Handler
from de3.server.processes.receiver import ALL, Receiver
from de3.server.processes.remote import RemoteAuditStore
from de3.server.processes.samples import Family, families_of
from de3.server.processes.upstreams import RemoteUpstreams
from de3.server.service import Service
from de3.server.settings import Settings
from de3.server.shared import Leases

log = logging.getLogger("de3")


def part_of(settings: Settings, processes: int) -> Settings:
    """The settings of one of several processes, with its part of the engine threads and of the server's limits.

    The limits are those on texts and body bytes in flight, and on connections. No part of a limit is smaller than one
    request needs.
    """

    def part(limit: int, least: int = 1) -> int:
        return max(least, ceil(limit / processes))

    return settings.model_copy(
        update={
            "threads": part(settings.engine_threads()),
            "max_queue": part(settings.max_queue, settings.max_texts),
            "max_inflight_bytes": part(settings.max_inflight_bytes, settings.max_body_bytes),
            "max_connections": part(settings.max_connections or max_connections()),
        }
    )


@dataclass(frozen=True)
class State:
    """The models that a process has loaded, from which another process can load them.

    Attributes:
        plans: the plans that loaded them.
        routes: their roles, by name.
        failed: why the process could not load them; empty if it could.
    """

    plans: list[Plan]
    routes: dict[str, Route]
    failed: str = ""

    @property
    def artifacts(self) -> list[Artifact]:
        """The loaded artifacts."""
        return [plan.artifact for plan in self.plans if plan.artifact is not None]


class Worker:
    """One process; implements `Shared` (shared.py) by messages to the supervisor."""

    def __init__(self, control: socket.socket, sockets: socket.socket) -> None:
        """control: carries the channel. sockets: carries connections and weights, as file descriptors."""
        self._control = control
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_draining = False
        self.receiver, self.channel = Receiver(sockets, self._drain), Channel()
        self.audit_store = RemoteAuditStore(self.channel, self._apply)
        self.upstreams = RemoteUpstreams(self.channel)
        self.leases = Leases(partial(self.channel.call, "lease"), partial(self.channel.tell, "charge"))
        self.change = partial(self.channel.call, "change")  # see SharedModels.change

    def attach(self, service: Service, stop: Callable[[], None]) -> None:
        """Set the service of this process. stop: ends the HTTP server after the accepted requests."""
        self.service, self._stop = service, stop

    def run(self) -> None:
        """Open the channel, and receive connections; called in the event loop."""
        self._loop = loop = asyncio.get_running_loop()
        self._to_load, self._may_open = loop.create_future(), loop.create_future()
        run_once("channel", self._run_channel())
        self.receiver.start()

    async def _run_channel(self) -> None:
        service = self.service
        handlers: dict[str, Handler] = {
            "load": self._load,
            "open": self._open,
            "drain": service.drain,
            "plan": service.manager.plan,
            "prepare": self._prepare,
            "commit": service.manager.commit,
            "abort": service.manager.abort,
            "pin": service.manager.pin,
            "state": self._state,
            "samples": self._samples,
            "live": service.audits.live,
            "standing": self.audit_store.published,
            "sync": lambda: None,
        }
        self.channel.tell("running")
        try:
            await self.channel.run(self._control, handlers)
        finally:
            self._drain()  # the supervisor has ended, or sent an invalid message

    def listen(self, create: Callable[[], asyncio.Protocol]) -> None:
        """Serve connections. create: makes the protocol of a connection."""
        self.receiver.listen(create)
        self.channel.tell("listening")

    def _drain(self) -> None:
        self.receiver.stop()
        if not self._is_draining:
            self._is_draining = True
            self.service.drain()
            self._stop()

    def leave(self) -> None:
        """Tell the supervisor that this process has failed, and accepts no more connections."""
        self.channel.tell("leaving")

    # Shared

    async def others_ready(self) -> bool:
        """True if a process of the server answers requests."""
        try:
            return bool(await self.channel.call("is_ready"))
        except ChannelClosedError:  # the supervisor has ended
            return False

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models when the supervisor asks for it, and wait until it lets this process answer requests.

        Raises the error if loading fails.
        """
        self._to_load.set_result((manager, artifacts, are_named))
        await self._may_open

    async def scrape(self) -> bytes:
        """The metrics of all processes; raises RequestError if too many requests are waiting for them."""
        text: str = await self.channel.call("scrape")
        return text.encode()

    def start(self) -> None:
        """Tell the supervisor that this process is ready."""
        self.channel.tell("ready")

    def stop(self) -> None:
        """Send the last settled texts and records, and wait until the supervisor has counted them, for up to 5 s.

        Called in another thread.
        """
        if self._loop is not None:
            done = asyncio.run_coroutine_threadsafe(self._flush(), self._loop)
            try:
                done.result(5.0)
            except (TimeoutError, ChannelClosedError):
                log.warning("the supervisor did not confirm the last audits")
            except Exception as error:
                report("last_audits", error)

    async def _flush(self) -> None:
        self.audit_store.send()
        self.upstreams.send()
        await self.channel.call("sync")  # the answer shows that all earlier notes were handled

    # Called by the supervisor

    async def _load(self, state: State | None) -> State:
        """Load the models of another process; None: this is the first process, which loads those that it was given."""
        self.receiver.receive(ALL)  # weights that were sent before
        manager, artifacts, are_named = await self._to_load
        try:
            if state is None:
                await manager.begin(artifacts, are_named)
            else:
                await manager.restore(state.plans, state.routes)
        except Exception as error:
            if not self._may_open.done():  # it is cancelled if this process drains
                self._may_open.set_exception(error)
            return State([], {}, str(error))
        self.receiver.release_weights()
        return self._state()

    def _open(self) -> None:
        if not self._may_open.done():
            self._may_open.set_result(None)

    async def _prepare(self, plan: Plan) -> Plan:
        """Prepare a plan; returns it with the results of loading."""
        self.receiver.receive(ALL)  # weights that were sent before
        is_loaded = False
        try:
            await self.service.manager.prepare(plan)
            is_loaded = True
        finally:
            self.receiver.release_weights(is_loaded)
        return plan

    def _state(self) -> State:
        manager, models = self.service.manager, self.service.models
        return State([manager.plans[served.model.full_name] for served in models.all], models.routes)

    async def _samples(self) -> list[Family]:
        return await asyncio.to_thread(families_of, self.service.metrics.registry)

    def _apply(self, manifest: Manifest, standing: Standing) -> None:
        self.service.audits.apply(manifest, standing)


class WorkerServer(HttpServer):
    """A uvicorn server whose connections come from the supervisor, and which only the supervisor stops."""

    def __init__(self, config: Any, service: Service, worker: Worker) -> None:
        super().__init__(config, service)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the channel, then begin to load the models, then serve connections."""
        self._worker.run()
        await super().startup(sockets=[])
        self._worker.listen(self.connect)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ignore the signal: it may reach all processes, and the supervisor drains them."""


def main(
    number: int,
    settings: Settings,
    artifacts: Sequence[Artifact],
    control: socket.socket,
    sockets: socket.socket,
) -> None:
    """Run a process until the supervisor closes its sockets; exits with 1 if its models or its engine fail.

    number: number of the process, from 1. settings: see part_of(). artifacts: see Service. control, sockets: see
    Worker.
    """
    for one in stop_signals():
        signal.signal(one, signal.SIG_IGN)
    memory.keep_large_blocks_apart()
    random.seed()  # the processes are forked with the same random state
    sys.setswitchinterval(0.0005)  # see server/main.py
    logs.configure(settings.log_format, number)
    try:
        _serve(settings, artifacts, Worker(control, sockets))
    except Exception:  # otherwise multiprocessing would print it
        log.critical("the process failed", exc_info=True)
        sys.exit(1)


def _serve(settings: Settings, artifacts: Sequence[Artifact], worker: Worker) -> None:
    service = Service(settings, artifacts, worker, worker.receiver.memory_of)

    def stop() -> None:
        server.should_exit = True

    def fail() -> None:
        worker.leave()
        stop()

    worker.attach(service, stop)
    server = WorkerServer(uvicorn_config(service, fail, on_closed=worker.receiver.closed), service, worker)
    server.run()
    if service.failure is not None:
        sys.exit(1)
