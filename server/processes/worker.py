"""A process that serves models, for a supervisor: it has the HTTP server and the engine, but does not listen."""

import asyncio
import logging
import os
import random
import signal
import socket
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from math import ceil
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from de3.model_store.manifest import Manifest, fingerprint
from de3.model_store.store import Artifact
from de3.native.network import Memory, can_share_memory
from de3.server import logs
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.background import report, run_once
from de3.server.engine.served import Served
from de3.server.http.http_server import HttpServer, max_connections, uvicorn_config
from de3.server.learn.record import Record
from de3.server.manager import Change, Manager, Plan
from de3.server.models import Route
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.samples import Family, families_of
from de3.server.rules import InForce, Standing
from de3.server.service import Service
from de3.server.settings import Settings

log = logging.getLogger("de3")
CONNECTION, WEIGHTS = b"c", b"w"  # first byte of the messages that carry a file descriptor
CLOSED = b"x"  # first byte of a message with the number of closed connections
FD_MESSAGE_BYTES = 256
ALL = 2**16  # messages to receive at once: more than a socket buffers
MAX_UNSENT_BYTES = 2**20
SEND_S = 0.02  # settled texts are collected for this long, then sent together


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


def plan_row(plan: Plan) -> dict[str, Any]:
    """A plan as a JSON object."""
    row = {name: getattr(plan, name) for name in ("what", "name", "role", "share", "version", "no_kernels")}
    a = plan.artifact
    if a is None:
        return row | {"artifact": None}
    proof = None if a.proof is None else str(a.proof)
    return row | {"artifact": [str(a.path), a.manifest.model_dump_json(), proof]}


def plan_of(row: dict[str, Any]) -> Plan:
    """The plan in an object that plan_row() made."""
    artifact = row["artifact"]
    return Plan(**{**row, "artifact": None if artifact is None else artifact_of(artifact)})


def artifact_of(row: Sequence[Any]) -> Artifact:
    """The artifact in [path, manifest, proof], as plan_row() makes it."""
    path, manifest, proof = row
    return Artifact(
        Path(path), Manifest.model_validate_json(manifest), None if proof is None else Path(proof)
    )


def record_row(name: str, record: Record) -> list[Any]:
    """A record of a model's traffic as a JSON array. name: the model's name:version."""
    arrays = [b64encode(array.tobytes()).decode() for array in (record.states, record.logits)]
    return [name, record.client, record.share, record.key, len(record.states), *arrays]


def record_of(row: list[Any]) -> tuple[str, Record]:
    """The inverse of record_row(): the model's name:version, and the record."""
    name, client, share, key, layers, states, logits = row
    pooled = np.frombuffer(b64decode(states), np.float16).reshape(layers, -1)
    return name, Record(client, share, key, pooled, np.frombuffer(b64decode(logits), np.float32))


class Worker:
    """One process; implements `Shared`, `Leases` (shared.py) and `Books` (audits.py) by messages to the supervisor."""

    def __init__(self, settings: Settings, control: socket.socket, sockets: socket.socket) -> None:
        """control: carries the channel. sockets: carries connections and weights, as file descriptors."""
        self.is_ready = False
        self.books, self.leases = self, self
        self._settings, self._control, self._sockets = settings, control, sockets
        self._standings: dict[str, Standing] = {}  # by fingerprint, as are the manifests
        self._manifests: dict[str, Manifest] = {}
        self._shares_weights = can_share_memory()
        self._settled: dict[str, list[Settled]] = {}  # not yet sent, by name:version
        self._records: list[list[Any]] = []  # not yet sent
        self._weights: dict[str, int] = {}  # file descriptors of filled memory, by fingerprint
        self._new_weights: dict[str, int] = {}  # the same for memory that this process fills
        self._loop: asyncio.AbstractEventLoop | None = None
        self._create: Callable[[], asyncio.Protocol] | None = None
        self._early: list[socket.socket] = []
        self._closed = 0  # closed connections not yet reported to the supervisor
        self._is_draining = False
        self.channel = Channel(
            {
                "load": self._load,
                "open": self._open,
                "plan": self._plan,
                "prepare": self._prepare,
                "commit": self._commit,
                "abort": self._abort,
                "state": self._state,
                "samples": self._samples,
                "live": self._live,
                "standing": self._standing,
                "all_ready": self._all_ready,
                "sync": lambda: None,
            }
        )

    def attach(self, service: Service, stop: Callable[[], None]) -> None:
        """Set the service of this process. stop: ends the HTTP server after the accepted requests."""
        self.service, self._stop = service, stop

    # Shared

    async def begin(self, manager: Manager, artifacts: Sequence[Artifact], are_named: bool) -> None:
        """Load the models when the supervisor asks for it, and wait until it lets this process answer requests.

        Raises the error if loading fails.
        """
        self._to_load.set_result((manager, artifacts, are_named))
        await self._may_open

    async def _load(self, said: list[Any] | None) -> dict[str, Any]:
        """Load the models; returns their state (see _state), or {"failed": reason}.

        said: [plans, routes] of another process; None: this is the first process to load them.
        """
        self._receive(ALL)  # weights that were sent before
        manager, artifacts, are_named = await self._to_load
        try:
            if said is None:
                await manager.begin(artifacts, are_named)
            else:
                plans, routes = said
                routes = {name: Route(**row) for name, row in routes.items()}
                await manager.restore([plan_of(row) for row in plans], routes)
        except Exception as error:
            if not self._may_open.done():  # cancelled if this process drains
                self._may_open.set_exception(error)
            return {"failed": str(error)}
        self._release_weights()
        return self._state()

    def _open(self) -> None:
        if not self._may_open.done():
            self._may_open.set_result(None)

    async def scrape(self) -> bytes:
        """The metrics of all processes, in the text format of Prometheus.

        Raises RequestError if too many requests wait for them.
        """
        text: str = await self.channel.call("scrape")
        return text.encode()

    async def change(self, change: Change) -> dict[str, Any]:
        """Change the served models of all processes, or of none; returns the body of the admin route's response.

        Raises RequestError as SharedModels.change does.
        """
        answer: dict[str, Any] = await self.channel.call("change", asdict(change))
        return answer

    async def lease(self, owner: str, texts: int) -> int:
        """Take at least this many texts from an owner's rate limit; returns the number taken.

        Raises RequestError if the limit does not permit as many.
        """
        granted: int = await self.channel.call("lease", owner, texts)
        return granted

    def charge(self, owner: str, texts: int) -> None:
        """Count texts that already ran, even beyond the owner's rate limit."""
        self.channel.tell("charge", owner, texts)

    def leave(self) -> None:
        """Tell the supervisor that this process has failed, and takes no more connections."""
        self.channel.tell("leaving")

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
        self._send_settled()
        self._send_records()
        await self.channel.call("sync")  # the answer shows that all earlier notes were handled

    # Books

    def serve(self, served: Served) -> Standing:
        """The standing of a model's ledger, as the supervisor last sent it; epoch 0 without τ if it has sent none."""
        key = fingerprint(served.model.manifest)
        self._manifests[key] = served.model.manifest
        return self._standings.get(key, Standing(0, 0, {}))

    def forget(self, served: Served) -> None:
        """Forget an unloaded model."""
        key = fingerprint(served.model.manifest)
        for known in (self._manifests, self._standings):
            known.pop(key, None)

    @property
    def is_behind(self) -> bool:
        """True while the supervisor does not read as fast as texts are settled."""
        return self.channel.unsent > MAX_UNSENT_BYTES

    def count(self, name: str, settled: Sequence[Settled]) -> None:
        """Send settled texts to the supervisor, those of several requests together; see Ledger.count."""
        if not self._settled and self._loop is not None:
            self._loop.call_later(SEND_S, self._send_settled)
        all_ = self._settled.setdefault(name, [])
        for one in settled:
            if all_ and one.continues(all_[-1]):
                all_[-1].extend(one)
            else:
                all_.append(one)

    def _send_settled(self) -> None:
        sent, self._settled = self._settled, {}
        for name, settled in sent.items():
            self.channel.tell("count", name, settled)

    def learn(self, name: str, record: Record) -> None:
        """Send a record of a model's traffic to the supervisor, together with others."""
        if not self._records and self._loop is not None:
            self._loop.call_later(SEND_S, self._send_records)
        self._records.append(record_row(name, record))

    def _send_records(self) -> None:
        sent, self._records = self._records, []
        self.channel.tell("records", sent)

    async def learning(self, name: str, starts: bool) -> dict[str, Any]:
        """The learning report of a model name; see Books.learning."""
        answer: dict[str, Any] = await self.channel.call("learning", name, starts)
        return answer

    async def report(self, served: Served, live: Live, reader: str | None) -> dict[str, Any]:
        """The audit results of a model; raises RequestError as SharedBooks.report does."""
        level = self.service.admission.level
        answer: dict[str, Any] = await self.channel.call("report", served.model.full_name, level, reader)
        return answer

    async def reset(self, served: Served) -> dict[str, Any]:
        """Discard the audit results of a model; returns the τ that is then in force, and the reason for it.

        Raises RequestError if the model is no longer served.
        """
        level = self.service.admission.level
        answer: dict[str, Any] = await self.channel.call("reset", served.model.full_name, level)
        return answer

    # Called by the supervisor

    async def _plan(self, change: dict[str, Any]) -> dict[str, Any]:
        return plan_row(await self.service.manager.plan(Change(**change)))

    async def _prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        self._receive(ALL)  # weights that were sent before
        plan, is_loaded = plan_of(row), False
        try:
            await self.service.manager.prepare(plan)
            is_loaded = True
        finally:
            self._release_weights(is_loaded)
        loaded = self.service.manager.prepared
        return {"no_kernels": plan.no_kernels, **({} if loaded is None else _identity(loaded))}

    def _commit(self) -> dict[str, Any]:
        return self.service.manager.commit()

    def _abort(self) -> None:
        self.service.manager.abort()

    def _state(self) -> dict[str, Any]:
        """The loaded models and their roles, from which another process can load them."""
        models = self.service.models
        return {
            "models": [
                {"plan": plan_row(self.service.manager.plans[served.model.full_name]), **_identity(served)}
                for served in models.all
            ],
            "routes": {name: asdict(route) for name, route in models.routes.items()},
        }

    async def _samples(self) -> list[Family]:
        return await asyncio.to_thread(families_of, self.service.metrics.registry)

    def _live(self, name: str) -> list[Any]:
        auditor = self.service.audits.get(self.service.models.current(name))
        return [] if auditor is None else list(auditor.live)

    def _standing(self, key: str, epoch: int, num_changes: int, tenants: dict[str, list[Any]]) -> None:
        """Take a change of a ledger's standing."""
        changed = Standing(epoch, num_changes, {name: InForce(*row) for name, row in tenants.items()})
        known = self._standings.get(key)
        of_all = {} if known is None or known.epoch != epoch else known.tenants
        self._standings[key] = changed._replace(tenants=of_all | changed.tenants)
        if key in self._manifests:
            self.service.audits.apply(self._manifests[key], changed)

    def _all_ready(self, is_ready: bool) -> None:
        self.is_ready = is_ready

    # Weights

    def memory_of(self, artifact: Artifact) -> Memory | None:
        """Memory for the weights of a model, which another process may have filled; None if memory cannot be shared."""
        if not self._shares_weights:
            return None
        key = fingerprint(artifact.manifest)
        if (fd := self._weights.get(key)) is not None:
            return Memory(fd, True)
        fd = self._new_weights[key] = os.memfd_create("de3-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return Memory(fd, False)

    def _release_weights(self, are_filled: bool = True) -> None:
        """Send newly filled memory to the supervisor, then close all memory of weights; the kernels have mapped it.

        are_filled: the new memory was filled; False: loading failed.
        """
        for key, fd in self._new_weights.items() if are_filled else ():
            with suppress(OSError):  # then each process fills its own
                socket.send_fds(self._sockets, [WEIGHTS + key.encode()], [fd])
        for fd in (*self._new_weights.values(), *self._weights.values()):
            os.close(fd)
        self._new_weights, self._weights = {}, {}

    # Connections

    def run(self) -> None:
        """Open the channel, and receive connections; called in the event loop."""
        self._loop = loop = asyncio.get_running_loop()
        self._to_load, self._may_open = loop.create_future(), loop.create_future()
        run_once("channel", self._run_channel())
        self._sockets.setblocking(False)
        self._loop.add_reader(self._sockets, self._receive)

    async def _run_channel(self) -> None:
        self.channel.tell("running")
        try:
            await self.channel.run(self._control)
        finally:
            self._drain()  # the supervisor has ended, or cannot be understood

    def listen(self, create: Callable[[], asyncio.Protocol]) -> None:
        """Serve connections, including those that arrived early. create: makes the protocol of a connection."""
        self._create = create
        early, self._early = self._early, []
        for sock in early:
            self._accept(sock)
        self.channel.tell("listening")

    def _receive(self, most: int = 16) -> None:
        for _ in range(most):
            try:
                data, fds, _, _ = socket.recv_fds(self._sockets, FD_MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionError:
                data, fds = b"", []
            for fd in fds:
                os.set_inheritable(fd, False)
            if not data:
                self._drain()  # the supervisor sends no more connections
                return
            if not fds:  # this process had no free file descriptor for it
                if data[:1] == CONNECTION:
                    self.closed()
            elif data[:1] == WEIGHTS:
                self._weights[data[1:].decode()] = fds[0]
            else:
                self._accept(socket.socket(fileno=fds[0]))

    def _accept(self, sock: socket.socket) -> None:
        if self._create is None or self._loop is None:
            self._early.append(sock)
            return
        run_once("connection", self._connect(sock, self._create))

    async def _connect(self, sock: socket.socket, create: Callable[[], asyncio.Protocol]) -> None:
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(create, sock)
        except BaseException as error:
            sock.close()
            self.closed()
            if not isinstance(error, OSError):  # the client is gone
                raise

    def closed(self) -> None:
        """Tell the supervisor that a connection was closed."""
        self._closed += 1
        if self._closed == 1 and self._loop is not None:
            self._loop.call_soon(self._tell_closed)

    def _tell_closed(self) -> None:
        try:
            self._sockets.send(CLOSED + b"%d" % self._closed)
        except BlockingIOError:  # the supervisor is busy
            if self._loop is not None:
                self._loop.call_later(SEND_S, self._tell_closed)
        except OSError:  # it has ended
            return
        else:
            self._closed = 0

    def _drain(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._sockets)
        if not self._is_draining:
            self._is_draining = True
            self.service.drain()
            self._stop()


def _identity(served: Served) -> dict[str, Any]:
    model = served.model
    return {"full_name": model.full_name, "runtime": model.runtime, "tau_factor": served.monitor.tau_factor}


class WorkerServer(HttpServer):
    """A uvicorn server whose connections come from the supervisor, and which only the supervisor stops."""

    def __init__(self, config: Any, service: Service, worker: Worker) -> None:
        super().__init__(config, service)
        self._worker = worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the channel, then begin to load the models, then serve connections."""
        self._worker.run()
        await super().startup(sockets=[])
        create: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        self._worker.listen(
            partial(create, config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        )

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
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    random.seed()  # the processes are forked with the same random state
    sys.setswitchinterval(0.0005)  # see server/main.py
    logs.configure(settings.log_format, number)
    worker = Worker(settings, control, sockets)
    service = Service(settings, artifacts, worker, worker.memory_of)

    def stop() -> None:
        server.should_exit = True

    def fail() -> None:
        worker.leave()
        stop()

    worker.attach(service, stop)
    server = WorkerServer(uvicorn_config(service, fail, on_closed=worker.closed), service, worker)
    server.run()
    if service.failure is not None:
        sys.exit(1)
