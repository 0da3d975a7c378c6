"""The supervisor's parts, with real sockets; `test_processes.py` runs whole servers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from itertools import chain, product, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from de3.exits.guarantee import Audited
from de3.model_store.manifest import encoder_hashes, fingerprint
from de3.model_store.store import Artifact, Store
from de3.runtime.background import errors
from de3.runtime.choice import InForce, Standing
from de3.runtime.errors import RequestError
from de3.runtime.rules import Rules
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.learn.record import Record
from de3.server.manager import Change, Plan
from de3.server.models import Route
from de3.server.processes import connections, group, supervisor
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.connections import Connections
from de3.server.processes.group import ANSWER_CHECKS, LOAD_CHECKS, LOOP_CHECKS, Group, Process
from de3.server.processes.metrics import SharedMetrics
from de3.server.processes.models import SharedModels
from de3.server.processes.receiver import CLOSED, CONNECTION
from de3.server.processes.remote import MAX_UNSENT_BYTES, RemoteAuditStore
from de3.server.processes.samples import Family
from de3.server.processes.supervisor import ENDS_S, MAX_ENDS, MAX_STARTS, RETRY_S, ServerError, Supervisor
from de3.server.processes.weights import Weights
from de3.server.processes.worker import State, Worker
from de3.server.settings import Settings
from tests.serving import in_event_loop

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
STATE = State([], {})


@asynccontextmanager
async def member(
    number: int, group: Group | None = None, is_ready: bool = False, **handlers: Callable[..., Any]
) -> AsyncIterator[Process]:
    """A stand-in for a process in a group: it runs `sleep`; only its channel is real, and answers with the handlers."""
    (ours, its), (sockets, its_sockets) = (socket.socketpair() for _ in range(2))
    sockets.setblocking(False)
    os_process = subprocess.Popen(["sleep", "60"])
    process = Process(number, os_process, sockets, is_member=True, is_listening=True, is_ready=is_ready)
    if group is not None:
        group.add(process)
    running = [asyncio.create_task(process.channel.run(ours, {}))]
    running.append(asyncio.create_task(Channel().run(its, handlers)))
    try:
        yield process
    finally:
        os_process.kill()
        os_process.wait()
        for task in running:
            task.cancel()
        for one in (sockets, its_sockets):
            one.close()


def shared_models(store: Path, weights: Weights | None = None) -> tuple[Group, SharedModels]:
    group = Group(2)
    return group, SharedModels(Settings(store=store, processes=2), group, weights or Weights())


def plan_to(what: Any, artifact: Artifact | None = None) -> Plan:
    return Plan(Change(what, "tiny"), artifact)


class Idle(Supervisor):
    """A supervisor that starts no processes: it records the pauses after which it would start them.

    Create it in an event loop.
    """

    def __init__(self, store: Path, processes: int = 2, listening: socket.socket | None = None) -> None:
        settings = Settings(store=store, processes=processes, drain_s=600)
        super().__init__(settings, ())
        self._connections = Connections(self._group, [] if listening is None else [listening])
        self._over = self.over = asyncio.get_running_loop().create_future()
        self.group, self.pauses = self._group, list[float]()

    async def _live(self, number: int, pause_s: float = 0.0) -> None:
        self.pauses.append(pause_s)

    def handle(self, process: Process, method: str) -> None:
        """Handle a note of a process."""
        self._handlers(process)[method]()

    def ends(self, process: Process) -> None:
        """What happens when a process ends."""
        self._gone(process)

    def signal(self) -> None:
        """What happens at SIGTERM."""
        self._signalled()

    def listen(self) -> None:
        self._connections.start()

    async def drain(self) -> None:
        """Stop, as at the end of the server; the processes have ended."""
        await self._drain()

    async def fail(self, times: int) -> list[float]:
        """Fail to start process 1 a number of times; returns the pauses."""
        self.pauses.clear()
        for _ in range(times):
            self._failed(1, "no memory")
        await asyncio.sleep(0)
        return self.pauses


@contextmanager
def attached() -> Iterator[tuple[Worker, socket.socket, socket.socket]]:
    """A worker, and the supervisor's ends of its channel and of the socket that carries file descriptors."""
    ours, its = socket.socketpair()
    sockets, its_sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its, sockets, its_sockets:
        for one in (sockets, its_sockets):
            one.setblocking(False)
        worker = Worker(its, its_sockets)
        worker.attach(mock.Mock(), mock.Mock())
        yield worker, ours, sockets


async def never() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("method", "state", "expected"),
    [
        ("state", {"is_ready": True}, ANSWER_CHECKS),
        ("prepare", {"is_ready": True}, LOAD_CHECKS),
        ("sync", {"is_ready": True}, LOOP_CHECKS),
        ("sync", {"is_ready": True, "is_preparing": True}, LOAD_CHECKS),
    ],
)
@in_event_loop
async def test_a_process_that_does_not_answer_in_a_number_of_checks_is_killed(
    monkeypatch: pytest.MonkeyPatch, method: str, state: dict[str, bool], expected: int
) -> None:
    """Seconds do not count: a supervisor that was paused would have seen many of them."""
    checks, wait = 0, asyncio.wait

    async def check(answers: Any, timeout: float) -> Any:
        nonlocal checks
        checks += 1
        return await wait(answers, timeout=0)

    async with member(1, **{method: never}) as process:
        monkeypatch.setattr(asyncio, "wait", check)
        vars(process).update(state)
        with pytest.raises(ChannelClosedError, match="does not answer"):
            await process.call(method)
        assert await asyncio.to_thread(process.os_process.wait) == -signal.SIGKILL
        assert checks == expected and process.is_preparing == state.get("is_preparing", False)


@in_event_loop
async def test_a_process_is_late_while_its_event_loop_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "CHECK_S", 0.01)
    answers = asyncio.Event()
    async with member(1, sync=answers.wait) as process:
        watching = asyncio.create_task(process.watch())
        for is_late in (True, False):
            while process.is_late != is_late:
                await asyncio.sleep(0.001)
            answers.set()
        watching.cancel()


def taker(number: int, takes: bool | Iterator[bool] = True, **state: Any) -> Any:
    """A stand-in for a ready process that takes connections, or does at some of the attempts."""
    taken = list[socket.socket]()

    def take(client: socket.socket) -> bool:
        can_take = takes if isinstance(takes, bool) else next(takes)
        taken.extend([client.dup()] if can_take else [])
        return can_take

    known = {"is_listening": True, "is_ready": True, "is_late": False, "connections": 0}
    return SimpleNamespace(number=number, take=take, taken=taken, **known | state)


LOADING, LATE = {"is_ready": False}, {"is_late": True}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([{"connections": 2}, {"connections": 1}], 2),
        ([LATE, {"connections": 9}], 2),
        ([LATE, LOADING], 1),
        ([{"connections": 9}, LOADING], 1),  # ready processes first
        ([{"takes": False}, {"connections": 9}], 2),
        ([{"takes": False}, LOADING], None),
        ([LOADING, {"is_ready": False, "is_listening": False}], 1),
        ([{"takes": chain([False] * 3, repeat(True))}], 1),  # no process takes it at first
    ],
    ids=range(8),
)
@in_event_loop
async def test_a_connection_goes_to_the_process_that_can_answer_first(
    monkeypatch: pytest.MonkeyPatch, states: list[dict[str, Any]], expected: int | None
) -> None:
    """At the end of the server, when one that no process has taken by then is closed."""
    monkeypatch.setattr(connections, "ACCEPT_S", 0.02 if expected is None else 30.0)
    group, takers = Group(2), [taker(number, **state) for number, state in enumerate(states, 1)]
    for one in takers:
        group.add(one)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pending = Connections(group, [listening])
        pending.start()
        with socket.create_connection(listening.getsockname(), timeout=30) as client:
            await pending.drain()
            assert [one.number for one in takers if one.taken] == ([] if expected is None else [expected])
            with suppress(ConnectionResetError):
                assert expected or client.recv(1) == b""
        assert listening.fileno() == -1
    for sock in (sock for one in takers for sock in one.taken):
        sock.close()


@in_event_loop
async def test_a_failing_process_gets_no_more_connections(store: Path) -> None:
    server = Idle(store)
    async with member(1, server.group, is_ready=True) as leaving, member(2, server.group, is_ready=True):
        with socket.socket() as client:
            assert leaving.take(client) and leaving.connections == 1
            server.handle(leaving, "leaving")
            assert not leaving.take(client) and not (leaving.is_ready or leaving.is_listening)
            assert leaving.connections == 1 and server.group.is_ready


@in_event_loop
async def test_errors_of_messages_are_reported_where_they_occur_and_calls_end_with_the_channel() -> None:
    ours, its = socket.socketpair()
    caller, other, before = Channel(), Channel(), errors["message"]

    async def unserializable() -> object:
        return object()

    unexpected = RuntimeError("unexpected")
    fail, note = mock.AsyncMock(side_effect=unexpected), mock.Mock(side_effect=unexpected)
    handlers = {"note": note, "value": unserializable, "fail": fail, "ask": object, "state": never}
    running = [asyncio.create_task(caller.run(ours, {})), asyncio.create_task(other.run(its, handlers))]
    caller.tell("note")
    for method in ("value", "fail", "ask"):
        with pytest.raises(RequestError):
            await caller.call(method)
    assert errors["message"] == before + 4
    call = asyncio.create_task(caller.call("state"))
    await asyncio.sleep(0)
    its.shutdown(socket.SHUT_RDWR)
    for one in (call, caller.call("state")):
        with pytest.raises(ChannelClosedError):
            await asyncio.wait_for(one, 30)
    await asyncio.gather(*running)


def test_memory_of_weights_is_shared_once_it_is_filled(store: Path) -> None:
    artifact, weights = Store(store).open("tiny-int8"), Weights()
    encoder = encoder_hashes(artifact.manifest)[-1]
    with attached() as (one, _, ours), attached() as (two, _, others):
        for is_filled in (False, True):
            memory = one.receiver.memory_of(encoder)
            assert memory is not None and not memory.is_filled
            one.receiver.release_weights(is_filled)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(memory.fd)
            Process(1, None, ours).receive(weights)
            weights.send(others, [artifact])
            two.receiver.receive()
            memory = two.receiver.memory_of(encoder)
            assert memory is not None and memory.is_filled == is_filled
            assert not os.get_inheritable(memory.fd)  # a fit inherits none
            two.receiver.release_weights(False)


def test_a_process_knows_the_standing_of_every_tenant_before_it_serves_the_model(store: Path) -> None:
    artifact, applied = Store(store).open("tiny-int8"), list[Any]()
    known = RemoteAuditStore(Channel(), lambda _, changed: applied.append(changed))
    states = [InForce(epoch, None, None) for epoch in range(3)]
    for changed in ({"a": states[0], "b": states[1]}, {"b": states[2]}):
        known.published(fingerprint(artifact.manifest), Standing(1, 0, changed))
    standing = known.serve(artifact, mock.Mock(), "native", 1.0)
    assert standing.tenants == {"a": states[0], "b": states[2]} and not applied
    known.published(fingerprint(artifact.manifest), last := Standing(2, 0, {}))
    assert known.serve(artifact, mock.Mock(), "native", 1.0) == last and applied == [last]


@in_event_loop
async def test_a_report_is_of_all_processes_and_a_reset_known_to_all_when_it_returns(store: Path) -> None:
    settings = Settings(store=store, processes=2, guarantee=0.2)
    manifest, known = Store(store).open("tiny-int8").manifest, list[int]()
    group = Group(2)
    coordinator = SharedModels(settings, group, Weights()).coordinator
    before = coordinator.ledgers.serve(manifest, Rules(manifest, settings), "native", 1.0)
    both = {
        "standing": lambda key, standing: known.append(standing["epoch"]),
        "sync": lambda: None,
        "live": lambda name: Live(0.5, 2, {"deadline": 1}),
    }
    async with member(1, group, True, **both), member(2, group, True, **both):
        report = await coordinator.report("tiny-int8:1", 0, None)
        assert [report[name] for name in ("share", "pending", "excluded")] == [0.5, 4, {"deadline": 2}]
        assert (await coordinator.reset("tiny-int8:1", 0))["tau"] == 0
        assert known == [before.epoch + 1] * 2


@in_event_loop
async def test_a_process_that_replaces_another_knows_every_standing_before_it_serves(store: Path) -> None:
    settings, group, known = Settings(store=store, processes=2, guarantee=0.2), Group(2), list[Any]()
    models = SharedModels(settings, group, Weights())
    manifest = Store(store).open("tiny-int8").manifest
    standing = models.coordinator.ledgers.serve(manifest, Rules(manifest, settings), "native", 1.0)
    both: dict[str, Any] = {"load": lambda state: STATE, "sync": lambda: None}
    told = both | {"standing": lambda *said: known.append(said), "open": lambda: known.append("open")}
    async with member(1, group, **both) as first, member(2, group, **told) as other:
        for process in (first, other):
            await models.load(process)
        await group.sync()
    (key, said), opened = known
    assert (key, said["epoch"], opened) == (fingerprint(manifest), standing.epoch, "open")


@in_event_loop
async def test_pending_connections_are_passed_on_before_the_processes_end(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Idle(store, listening=listening)
        async with member(1, server.group, is_ready=True) as process:
            server.listen()
            with socket.create_connection(listening.getsockname(), timeout=30):
                await server.drain()
            assert process.connections == 1


@in_event_loop
async def test_a_change_is_made_by_all_processes_or_by_none(store: Path) -> None:
    """A process that cannot commit is replaced, and the change stands."""
    weights, memory, said = Weights(), [os.memfd_create("weights") for _ in range(2)], list[str]()
    group, models = shared_models(store, weights)
    load, unload = plan_to("load", Store(store).open("tiny-int8")), plan_to("unload")

    def prepare(plan: Plan) -> Plan:
        for fd in memory if plan.artifact else ():
            weights.put(fingerprint(plan.artifact.manifest), fd)  # type: ignore[union-attr]
        return plan

    def refuse(plan: Plan) -> Plan:
        if plan.artifact:
            raise RequestError("no memory", cause="conflict")
        return plan

    handlers = {
        "load": lambda state: STATE,
        "plan": lambda change: load if change["what"] == "load" else unload,
        "pin": lambda change: {"next_start": change["what"]},
        "state": lambda: STATE,
        "sync": lambda: None,
    }
    cannot = mock.Mock(side_effect=ValueError("no"))
    first = {
        "prepare": prepare,
        "abort": lambda: said.append("1"),
        "commit": lambda: {"unloaded": ["tiny:1"]},
    }
    second = {"prepare": refuse, "abort": lambda: said.append("2"), "commit": cannot}
    async with (
        member(1, group, **handlers | first) as good,
        member(2, group, **handlers | second) as bad,
    ):
        for process in (good, bad):
            await models.load(process)
        changing = asyncio.create_task(models.change({"what": "load"}))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in progress"):
            await models.change({"what": "load"})
        with pytest.raises(RequestError, match="no memory"):
            await changing
        assert sorted(said) == ["1", "2"]
        for fd in memory:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        done = {"unloaded": ["tiny:1"], "next_start": "unload"}
        assert await models.change({"what": "unload"}) == done
        assert await asyncio.to_thread(bad.os_process.wait) == -signal.SIGKILL
        assert good.os_process.poll() is None and len(said) == 2 and models.are_loaded


@in_event_loop
async def test_a_process_that_loads_the_models_during_a_change_loads_them_again(store: Path) -> None:
    group, models = shared_models(store)
    states = [State([], {name: Route(1)}) for name in ("before", "after")]
    loaded, opened, plan = list[str](), list[int](), plan_to("unload")

    async def load(state: State) -> State:
        loaded.extend(state.routes)
        if len(loaded) == 1:
            await models.change({"what": "unload"})
        return state

    changing = {"plan": lambda change: plan, "prepare": lambda plan: plan, "commit": lambda: {}}
    first = changing | {"load": lambda state: states[0], "state": lambda: states[1], "pin": lambda change: {}}
    both: dict[str, Any] = {"sync": lambda: None, "open": lambda: opened.append(len(loaded))}
    async with member(1, group, **first, **both) as one, member(2, group, load=load, **both) as other:
        await models.load(one)
        group.open()
        other.is_member = False
        await models.load(other)
        await group.sync()
        assert loaded == ["before", "after"] and opened == [0, 2] and other.is_member


@in_event_loop
async def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(store: Path) -> None:
    manager = mock.Mock(begin=mock.AsyncMock(side_effect=ValueError("layer_02.onnx: damaged")))
    with attached() as (worker, ours, sockets):
        server, process = Idle(store), Process(1, SimpleNamespace(exitcode=0), sockets)
        server.group.add(process)
        running = asyncio.create_task(process.channel.run(ours, server._handlers(process)))
        worker.run()
        for process.is_ready in (True, False):
            assert await worker.others_ready() == process.is_ready
        with pytest.raises(ValueError, match="damaged"):
            await worker.begin(manager, (), False)
        await worker.channel.call("sync")
        server.ends(process)
        reason = await server.over
        assert isinstance(reason, ValueError) and str(reason) == "layer_02.onnx: damaged"
        running.cancel()


@in_event_loop
async def test_failed_starts_in_a_row_end_the_server_unless_another_process_is_ready(store: Path) -> None:
    server = Idle(store)
    async with member(1) as starting, member(2, server.group) as other:
        for _ in range(2):  # a process that has been ready begins anew
            assert await server.fail(MAX_STARTS) == [0.0] * MAX_STARTS
            assert not server.over.done() and not other.is_ready
            server.handle(starting, "ready")
        other.is_loaded = True  # it has waited for the first to start
        pauses = await server.fail(MAX_STARTS + 6)
        assert pauses[MAX_STARTS:] == [2.0, 4.0, 8.0, 16.0, RETRY_S, RETRY_S]
        assert other.is_ready and not server.over.done()
        other.is_ready = other.is_loaded = False
        assert await server.fail(1) == []
        assert isinstance(reason := await server.over, ServerError) and str(reason) == "no memory"


@in_event_loop
async def test_a_server_drains_at_the_first_signal_stops_at_the_second_and_kills_at_the_third(
    store: Path,
) -> None:
    server, drained = Idle(store), asyncio.Event()
    async with member(1, server.group, is_ready=True, drain=drained.set) as process:
        server.signal()
        await drained.wait()
        assert not server.over.done()
        server.signal()
        assert await server.over is None and process.os_process.poll() is None
        server.signal()
        assert await asyncio.to_thread(process.os_process.wait) == -signal.SIGKILL


@in_event_loop
async def test_processes_that_end_again_and_again_end_the_server(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(supervisor, "monotonic", lambda: now)
    server = Idle(store, processes=1)
    ends = (0.0, *(ENDS_S + 0.1 * i for i in range(MAX_ENDS)))
    for end, is_hung in product(ends, (True, False)):  # a stall of the machine is no reason to stop
        assert not server.over.done()
        now = end
        process = Process(1, SimpleNamespace(exitcode=-signal.SIGSEGV), socket.socket())
        server.group.add(process)
        server.handle(process, "ready")
        process.is_hung = is_hung
        server.ends(process)
    assert isinstance(await server.over, ServerError)


@in_event_loop
async def test_metrics_have_the_counts_of_ended_processes_and_do_not_wait_for_late_ones(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.server.processes.metrics.SAMPLES_S", 600)

    def samples(count: int) -> list[Family]:
        counter = Family("x", "", "counter", [("x_total", {"model": "a"}, count)])
        return [counter, Family("queue", "", "gauge", [("queue", {}, count)])]

    group = Group(2)
    metrics = SharedMetrics(group, mock.Mock(), Settings(store=store))
    for count in (3000, 40):
        metrics.remove(Process(1, None, socket.socket(), samples=samples(count)))
    async with member(1, group, samples=lambda: samples(5)), member(2, group, samples=never) as late:
        late.samples, late.is_late = samples(1000), True
        for _ in range(2):
            text = await metrics.scrape()
            assert 'x_total{model="a"} 4045.0\n' in text and "\nqueue 1000.0\n" in text


@in_event_loop
async def test_a_process_that_stops_first_sends_what_it_has_collected() -> None:
    sent: dict[str, list[Any]] = {"count": [], "learn": []}

    def count(name: str, settled: list[Settled]) -> None:
        sent["count"].extend((name, one.epoch, one.skipped) for one in settled)

    def learn(name: str, records: list[Record]) -> None:
        sent["learn"].extend((name, one) for one in records)

    handlers = {"running": lambda: None, "count": count, "learn": learn, "sync": lambda: None}
    with attached() as (process, ours, _):
        process.run()
        for epoch, skipped, count in ((1, 5, 1), (1, 7, 0), (2, 6, 0)):
            one = Settled("me", epoch, 0.5, skipped, [None] * count, [Audited([0.5], [[False]])] * count)
            process.audit_store.count("tiny:1", [one])
        states, logits = np.ones((2, 4), np.float16), np.array([0.1], np.float32)
        arrays = np.arange(128, dtype=np.uint32), 0.5, states, logits
        process.audit_store.learn("tiny:1", [Record("me", 0.5, 9, *arrays)])
        stopping = asyncio.create_task(asyncio.to_thread(process.stop))
        supervisor = asyncio.create_task(Channel().run(ours, handlers))
        await stopping
        assert sent["count"] == [("tiny:1", 1, 12), ("tiny:1", 2, 6)]
        ((name, record),) = sent["learn"]
        assert (name, record.client, record.share, record.key) == ("tiny:1", "me", 0.5, 9)
        found = record.pieces, record.spread, record.states, record.logits
        assert all(map(np.array_equal, found, arrays))
        supervisor.cancel()


@in_event_loop
async def test_the_first_processes_open_together_and_later_ones_alone() -> None:
    group, opened, draining = Group(3), list[int](), list[int]()

    def process(number: int) -> AbstractAsyncContextManager[Process]:
        handlers = {"open": lambda: opened.append(number), "drain": lambda: draining.append(number)}
        return member(number, group, sync=lambda: None, **handlers)

    async with process(1) as one, process(2) as two, process(3) as three:
        for loaded in (one, two):
            group.loaded(loaded)
        await group.sync()
        assert opened == [] and not group.is_ready  # the third one has not loaded the models
        group.open()  # as after a failed start
        await group.sync()
        assert sorted(opened) == [1, 2] and group.ready == [one, two]
        group.loaded(three)
        await group.sync()
        assert opened[2:] == [3] and group.ready == [one, two, three]
        group.remove(three)
        group.drain()
        async with process(3):  # a process that replaces another drains, too
            await group.sync()
            assert sorted(draining) == [1, 2, 3]


@in_event_loop
async def test_connections_that_close_are_counted_also_those_without_a_file_descriptor() -> None:
    with attached() as (worker, _, ours):
        process = Process(1, None, ours, connections=1001)
        ours.send(CONNECTION)  # as if the system had dropped the descriptor
        worker.receiver.receive()
        await asyncio.sleep(0)
        process.receive(Weights())
        assert process.connections == 1000
        for _ in range(1000):  # more messages than fit into the socket: the supervisor is busy
            worker.receiver.closed()
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            while process.connections:
                process.receive(Weights())
                await asyncio.sleep(0)


@in_event_loop
async def test_audits_pause_while_the_supervisor_reads_too_slowly() -> None:
    with attached() as (worker, ours, _):
        worker.run()
        await asyncio.sleep(0)
        for _ in range(2 * MAX_UNSENT_BYTES // 1000):
            assert not worker.audit_store.is_behind or worker.channel.unsent > MAX_UNSENT_BYTES
            worker.leases.charge("x" * 1000, 1)
            await asyncio.sleep(0)
        assert worker.audit_store.is_behind
        ours.setblocking(False)
        while worker.channel.unsent:
            with suppress(BlockingIOError):
                ours.recv(2**20)
            await asyncio.sleep(0)
        assert not worker.audit_store.is_behind


@in_event_loop
async def test_a_process_that_cannot_read_its_channel_drains() -> None:
    """The supervisor then replaces it. A connection that cannot be served is closed, and reported as closed."""
    unexpected, before = mock.Mock(side_effect=RuntimeError("unexpected")), errors.copy()
    client, accepted = socket.socketpair()
    with attached() as (worker, ours, sockets), client:
        worker.run()
        worker.listen(unexpected)
        socket.send_fds(sockets, [CONNECTION], [accepted.fileno()])
        accepted.close()
        assert await asyncio.to_thread(client.recv, 1) == b""
        sockets.setblocking(True)
        assert await asyncio.to_thread(sockets.recv, 10) == CLOSED + b"1"
        service: Any = worker.service
        assert errors - before == {"connection": 1} and not service.drain.called
        ours.send(b"\x00\x00\x00\x01?")
        while errors["channel"] == before["channel"]:
            await asyncio.sleep(0)
        assert service.drain.called
