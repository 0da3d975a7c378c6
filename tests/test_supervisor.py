"""The supervisor's parts, with real sockets; `test_processes.py` runs whole servers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from itertools import chain, product, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import orjson
import pytest

from de3.model_store.manifest import encoder_hashes, fingerprint
from de3.model_store.store import Artifact, Store
from de3.server.audit.report import Live
from de3.server.audit.tenant import Settled
from de3.server.errors import RequestError
from de3.server.http.access import Access
from de3.server.learn.record import Record
from de3.server.manager import Change, Plan
from de3.server.models import Route
from de3.server.processes import connections, group, remote, supervisor
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.connections import Connections
from de3.server.processes.group import ANSWER_CHECKS, LOAD_CHECKS, LOOP_CHECKS, Group, Process
from de3.server.processes.messages import decode, encode
from de3.server.processes.metrics import SharedMetrics
from de3.server.processes.models import SharedModels
from de3.server.processes.receiver import CONNECTION
from de3.server.processes.remote import MAX_UNSENT_BYTES, RemoteAuditStore
from de3.server.processes.samples import Family, families_from
from de3.server.processes.supervisor import ENDS_S, MAX_ENDS, MAX_STARTS, RETRY_S, ServerError, Supervisor
from de3.server.processes.weights import Weights
from de3.server.processes.worker import State, Worker
from de3.server.rules import InForce, Rules, Standing
from de3.server.service import Service
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


def supervised(store: Path, processes: int = 2) -> Supervisor:
    """A supervisor that has started; call it in an event loop."""
    server = Supervisor(Settings(store=store, processes=processes), (), [])
    server._over = asyncio.get_running_loop().create_future()
    return server


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


def test_values_of_messages_arrive_as_they_were(store: Path) -> None:
    artifact = replace(Store(store).open("tiny-int8"), proof=Path("proof"), sources={"a": 2**60})
    values = (
        State([plan_to("load", artifact), plan_to("unload")], {"tiny": Route(2, before=[1])}),
        Standing(2, 1, {"a": InForce(1, 0.5, "evidence"), "b": InForce(2, None, None)}),
        Settled("me", 1, 0.5, [0, 1], [2**64 - 1], [[0.5, None]], [[True, False]]),
        Live(0.5, 3, {"deadline": 1}),
    )
    for value in values:
        assert decode(type(value), orjson.loads(encode(value))) == value
    metric = Family("x", "", "gauge", [("x", {"a": "b"}, float("nan")), ("x", {}, 1.5)])
    assert repr(families_from(orjson.loads(encode([metric])))) == repr([metric])


@pytest.mark.parametrize(
    ("method", "state", "expected"),
    [
        ("state", {"is_ready": True}, ANSWER_CHECKS),
        ("prepare", {"is_ready": True}, LOAD_CHECKS),
        ("sync", {"is_ready": True}, LOOP_CHECKS),
        ("sync", {"is_ready": True, "is_preparing": True}, LOAD_CHECKS),
        ("sync", {}, LOAD_CHECKS),
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
async def test_a_process_is_late_while_its_event_loop_hangs_and_killed_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group, "CHECK_S", 0.01)
    monkeypatch.setattr(group, "LOAD_CHECKS", 10**6)
    answers = asyncio.Event()

    async def until_late(is_late: bool) -> None:
        while process.is_late != is_late:
            await asyncio.sleep(0.001)

    async with member(1, sync=answers.wait) as process:
        watching = asyncio.create_task(process.watch())
        await until_late(True)
        answers.set()
        await until_late(False)
        process.is_ready = True
        answers.clear()
        await watching
        assert process.is_late and await asyncio.to_thread(process.os_process.wait) == -signal.SIGKILL


@contextmanager
def accepting(group: Group) -> Iterator[tuple[Connections, socket.socket]]:
    """What accepts a group's connections, and the client of one that waits to be accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = Connections(group, [listening])
        connections.start()
        with socket.create_connection(listening.getsockname(), timeout=30) as client:
            yield connections, client
    assert listening.fileno() == -1


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
    with accepting(group) as (pending, client):
        await pending.drain()
        assert [one.number for one in takers if one.taken] == ([] if expected is None else [expected])
        with suppress(ConnectionResetError):
            assert expected or client.recv(1) == b""
    for sock in (sock for one in takers for sock in one.taken):
        sock.close()


@in_event_loop
async def test_accepting_without_a_free_file_descriptor_goes_on_later() -> None:
    group, one, accept = Group(1), taker(1), socket.socket.accept
    errors = [OSError(24, "Too many open files")]
    group.add(one)

    def accept_later(listening: socket.socket) -> Any:
        if errors:
            raise errors.pop()
        return accept(listening)

    with mock.patch("socket.socket.accept", accept_later), accepting(group) as (pending, _):
        while not one.taken:
            await asyncio.sleep(0)
        await pending.drain()
        one.taken.pop().close()


@in_event_loop
async def test_a_failing_process_gets_no_more_connections(store: Path) -> None:
    server = supervised(store)
    async with member(1, server._group, is_ready=True) as leaving, member(2, server._group, is_ready=True):
        with socket.socket() as client:
            assert leaving.take(client) and leaving.connections == 1
            server._handlers(leaving)["leaving"]()
            assert not leaving.take(client) and not (leaving.is_ready or leaving.is_listening)
            assert leaving.connections == 1 and server._group.is_ready


@in_event_loop
async def test_a_call_ends_with_the_process_that_it_asks() -> None:
    ours, its = socket.socketpair()
    channel = Channel()
    running = asyncio.create_task(channel.run(ours, {}))
    call = asyncio.create_task(channel.call("state"))
    await asyncio.sleep(0)
    its.close()
    for one in (call, channel.call("state")):
        with pytest.raises(ChannelClosedError):
            await asyncio.wait_for(one, 30)
    await running


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
        weights.keep([])
        weights.send(others, [artifact])
        two.receiver.receive()
        memory = two.receiver.memory_of(encoder)
        assert memory is not None and not memory.is_filled
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
async def test_a_process_that_cannot_commit_is_replaced_and_the_change_stands(store: Path) -> None:
    group, models = shared_models(store)
    plan, said = plan_to("unload"), list[str]()

    both = {
        "prepare": lambda plan: plan,
        "abort": lambda: said.append("abort"),
        "state": lambda: STATE,
        "plan": lambda change: plan,
        "pin": lambda change: {"next_start": change["what"]},
    }
    async with (
        member(1, group, **both, commit=lambda: {"unloaded": ["tiny:1"]}) as good,
        member(2, group, **both, commit=mock.Mock(side_effect=ValueError("no"))) as bad,
    ):
        done = {"unloaded": ["tiny:1"], "next_start": "unload"}
        assert await models.change({"what": "unload"}) == done
        assert await asyncio.to_thread(bad.os_process.wait) == -signal.SIGKILL
        assert good.os_process.poll() is None and said == [] and models.are_loaded


@in_event_loop
async def test_a_change_that_one_process_cannot_prepare_is_made_by_none(store: Path) -> None:
    plan, aborted = plan_to("load", Store(store).open("tiny-int8")), list[int]()
    weights, memory = Weights(), [os.memfd_create("weights") for _ in range(2)]
    group, models = shared_models(store, weights)
    models._set_state(STATE)

    def prepare(plan: Plan) -> Plan:
        assert plan.artifact is not None
        for fd in memory:
            weights.put(fingerprint(plan.artifact.manifest), fd)
        return plan

    refuse = mock.Mock(side_effect=RequestError("no memory", cause="conflict"))
    first_has = {"plan": lambda change: plan, "prepare": prepare, "abort": lambda: aborted.append(1)}
    async with (
        member(1, group, **first_has),
        member(2, group, prepare=refuse, abort=lambda: aborted.append(2)),
    ):
        changing = asyncio.create_task(models.change({"what": "load"}))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="in progress"):
            await models.change({"what": "load"})
        with pytest.raises(RequestError, match="no memory"):
            await changing
        assert sorted(aborted) == [1, 2]
    for fd in memory:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@in_event_loop
async def test_a_process_releases_a_model_that_others_cannot_prepare(store: Path) -> None:
    artifact, settings = Store(store).open("tiny-int8"), Settings(store=store)
    with attached() as (worker, ours, _):
        service = Service(settings, (artifact,), worker, worker.receiver.memory_of)
        worker.attach(service, lambda: None)
        worker.run()
        channel = Channel()
        running = asyncio.create_task(channel.run(ours, {"running": lambda: None}))
        await channel.call("prepare", plan_to("load", artifact))
        assert service.manager._loaded is not None
        await channel.call("abort")
        assert service.manager._loaded is None
        running.cancel()


@in_event_loop
async def test_a_process_that_loads_the_models_during_a_change_loads_them_again(store: Path) -> None:
    plan = plan_to("load", Store(store).open("tiny-int8"))
    states = [State([plan], {name: Route(1)}) for name in ("before", "after")]
    loaded, opened = list[str](), list[int]()
    group, models = shared_models(store)
    models._set_state(states[0])
    group.open()  # other processes have loaded the models

    def load(state: State) -> State:
        loaded.extend(state.routes)
        if len(loaded) == 1:
            models._set_state(states[1])
        return states[len(loaded) - 1]

    handlers = {"open": lambda: opened.append(len(loaded)), "sync": lambda: None}
    async with member(1, group, load=load, **handlers) as process:
        process.is_member = False
        await models.load(process)
        await process.call("sync")
        assert loaded == ["before", "after"] and opened == [2] and process.is_member


@in_event_loop
async def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(store: Path) -> None:
    manager = mock.Mock(begin=mock.AsyncMock(side_effect=ValueError("layer_02.onnx: damaged")))
    with attached() as (worker, ours, sockets):
        server = supervised(store)
        process = Process(1, SimpleNamespace(exitcode=0), sockets)
        server._group.add(process)
        running = asyncio.create_task(process.channel.run(ours, server._handlers(process)))
        worker.run()
        for process.is_ready in (True, False):
            assert await worker.others_ready() == process.is_ready
        with pytest.raises(ValueError, match="damaged"):
            await worker.begin(manager, (), False)
        await worker.channel.call("sync")
        server._gone(process)
        reason = await server._over
        assert isinstance(reason, ValueError) and str(reason) == "layer_02.onnx: damaged"
        running.cancel()


@in_event_loop
async def test_failed_starts_in_a_row_end_the_server_unless_another_process_is_ready(store: Path) -> None:
    server, pauses = supervised(store), list[float]()

    async def live(number: int, pause_s: float = 0.0) -> None:
        pauses.append(pause_s)

    async def fail(times: int) -> None:
        pauses.clear()
        for _ in range(times):
            server._failed(1, "no memory")
        await asyncio.sleep(0)

    server._live = live  # type: ignore[method-assign]
    async with member(1) as starting, member(2, server._group) as other:
        for _ in range(2):  # a process that has been ready begins anew
            await fail(MAX_STARTS)
            assert pauses == [0.0] * MAX_STARTS and not server._over.done() and not other.is_ready
            server._handlers(starting)["ready"]()
        other.is_loaded = True  # it has waited for the first to start
        await fail(MAX_STARTS + 6)
        assert pauses[MAX_STARTS:] == [2.0, 4.0, 8.0, 16.0, RETRY_S, RETRY_S] and not server._over.done()
        assert other.is_ready
        other.is_ready = other.is_loaded = False
        await fail(1)
        reason = await server._over
        assert pauses == [] and isinstance(reason, ServerError) and str(reason) == "no memory"


@in_event_loop
async def test_processes_that_end_again_and_again_end_the_server(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(supervisor, "monotonic", lambda: now)
    server = supervised(store, processes=1)
    server._live = lambda *_: asyncio.sleep(0)  # type: ignore[assignment, method-assign]
    ends = (0.0, *(ENDS_S + 0.1 * i for i in range(MAX_ENDS)))
    for end, is_hung in product(ends, (True, False)):  # a stall of the machine is no reason to stop
        assert not server._over.done()
        now = end
        process = Process(1, SimpleNamespace(exitcode=-signal.SIGSEGV), socket.socket())
        server._group.add(process)
        server._handlers(process)["ready"]()
        process.is_hung = is_hung
        server._gone(process)
    assert isinstance(await server._over, ServerError)


@in_event_loop
async def test_metrics_have_the_counts_of_ended_processes_and_do_not_wait_for_late_ones(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("de3.server.processes.metrics.SAMPLES_S", 600)

    def samples(count: int) -> list[Family]:
        counter = Family("x", "", "counter", [("x_total", {"model": "a"}, count)])
        return [counter, Family("queue", "", "gauge", [("queue", {}, count)])]

    group, collecting = Group(2), set[threading.Thread]()
    metrics = SharedMetrics(group, mock.Mock(), Settings(store=store))
    metrics._registry.register(own := mock.Mock(describe=list))
    own.collect.side_effect = lambda: collecting.add(threading.current_thread()) or []
    for count in (300, 40):
        metrics.remove(Process(1, None, socket.socket(), samples=samples(count)))
    async with member(1, group, samples=lambda: samples(5)), member(2, group, samples=never) as late:
        late.samples, late.is_late = samples(1000), True
        for _ in range(2):
            text = await metrics.scrape()
            assert 'x_total{model="a"} 1345.0\n' in text and "\nqueue 1000.0\n" in text
    assert collecting and threading.current_thread() not in collecting  # many tenants' bounds take long


@in_event_loop
async def test_a_process_that_stops_first_sends_what_it_has_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "SEND_S", 600)
    counted, records = list[Any](), list[Record]()

    def count(name: str, settled: list[Settled]) -> None:
        counted.append([name, *((one.epoch, one.skipped) for one in settled)])

    def learn(name: str, some: list[Record]) -> None:
        assert name == "tiny:1"
        records.extend(some)

    handlers = {"running": lambda: None, "count": count, "learn": learn, "sync": lambda: None}

    with attached() as (process, ours, _):
        process.run()
        for epoch, skipped, scores in ((1, 5, [[0.5]]), (1, 7, []), (2, 6, [])):
            one = Settled("me", epoch, 0.5, skipped, keys=[None for _ in scores], scores=scores)  # type: ignore[arg-type]
            process.audit_store.count("tiny:1", [one])
        pieces = np.arange(128, dtype=np.uint32)
        states, logits = np.arange(8, dtype=np.float16).reshape(2, 4), np.array([0.1, -3], np.float32)
        process.audit_store.learn("tiny:1", [Record("me", 0.5, 9, pieces, states, logits)])
        stopping = asyncio.create_task(asyncio.to_thread(process.stop))
        done, _ = await asyncio.wait({stopping}, timeout=0.1)
        assert not done  # the supervisor has not received it yet
        supervisor = asyncio.create_task(Channel().run(ours, handlers))
        await stopping
        assert counted == [["tiny:1", (1, 12), (2, 6)]]
        (one,) = records
        assert (one.client, one.share, one.key) == ("me", 0.5, 9)
        assert np.array_equal(one.pieces, pieces)
        assert np.array_equal(one.states, states) and np.array_equal(one.logits, logits)
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
        process = Process(1, None, ours, connections=5)
        ours.send(CONNECTION)  # as if the system had dropped the descriptor
        worker.receiver.receive()
        for then in (3, 2):
            worker.receiver.closed()
            await asyncio.sleep(0)
            process.receive(Weights())
            assert process.connections == then
        process.connections = 1000  # more messages than fit into the socket: the supervisor is busy
        for _ in range(process.connections):
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


def test_the_supervisor_counts_what_the_processes_take_from_a_rate_limit(store: Path) -> None:
    keys: Any = "someone a-key-of-some-length"
    server = Supervisor(Settings(store=store, processes=2, api_keys=keys, rate_limit="100/day"), (), [])
    handlers, limit = server._handlers(Process(1, None, socket.socket())), server._access.limit
    assert limit is not None
    handlers["lease"]("someone", 3)
    handlers["charge"]("someone", 5)
    assert limit.remaining("someone") == 92


def test_a_replacement_has_the_keys_with_which_the_server_started(tmp_path: Path, store: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("someone a-key-of-some-length # one; two\n")
    settings = Settings(store=store, api_keys_file=keys)
    part = settings.model_copy(update=Access(settings).keys)
    keys.write_text("other another-key-of-some-length\n")
    scope = {"headers": [(b"authorization", b"Bearer a-key-of-some-length")]}
    assert Access(part).user(scope) == "someone" and part.admin_keys is None
