"""The supervisor's parts, with real sockets; `test_processes.py` runs whole servers."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from de3.model_store.store import Store
from de3.server.errors import RequestError
from de3.server.http.access import Access
from de3.server.manager import Plan
from de3.server.processes import group
from de3.server.processes.books import SharedBooks
from de3.server.processes.channel import Channel, ChannelClosedError
from de3.server.processes.connections import Connections
from de3.server.processes.group import Group, Process
from de3.server.processes.models import SharedModels
from de3.server.processes.supervisor import Supervisor
from de3.server.processes.weights import Weights
from de3.server.processes.worker import CONNECTION, MAX_UNSENT_BYTES, Worker, plan_row
from de3.server.settings import Settings
from tests.test_processes import Running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
STATE: dict[str, Any] = {"models": [], "routes": {}}


@asynccontextmanager
async def member(number: int, **handlers: Callable[..., Any]) -> AsyncIterator[Process]:
    """A stand-in for a process: it runs `sleep`; only its channel is real, and answers with the handlers."""
    (ours, its), (sockets, its_sockets) = (socket.socketpair() for _ in range(2))
    sockets.setblocking(False)
    os_process = subprocess.Popen(["sleep", "60"])
    process = Process(number, os_process, Channel({}), sockets, is_member=True, is_listening=True)
    running = [asyncio.create_task(process.channel.run(ours))]
    running.append(asyncio.create_task(Channel(handlers).run(its)))
    try:
        yield process
    finally:
        os_process.kill()
        os_process.wait()
        for task in running:
            task.cancel()
        for one in (sockets, its_sockets):
            one.close()


async def no_change(_: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("nothing is learned")


async def never() -> None:
    await asyncio.Event().wait()


def test_a_process_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "ANSWER_S", 0.1)

    async def run() -> None:
        async with member(1, state=never) as process:
            with pytest.raises(ChannelClosedError, match="does not answer"):
                await process.call("state")
            assert await asyncio.to_thread(process.os_process.wait) == -signal.SIGKILL

    asyncio.run(run())


def test_a_process_that_cannot_commit_is_replaced_and_the_change_stands(store: Path) -> None:
    settings = Settings(store=store, processes=2)
    plan = plan_row(Plan("unload", "tiny", "current", 0.0, None, None))

    def refuse() -> None:
        raise ValueError("no")

    async def run() -> None:
        group = Group(2)
        models = SharedModels(settings, group, Weights(), SharedBooks(settings, group, no_change))
        said: list[str] = []
        both = {
            "prepare": lambda plan: {"no_kernels": ""},
            "abort": lambda: said.append("abort"),
            "state": lambda: STATE,
            "plan": lambda change: plan,
        }
        async with (
            member(1, **both, commit=lambda: {"unloaded": ["tiny:1"]}) as good,
            member(2, **both, commit=refuse) as bad,
        ):
            for process in (good, bad):
                group.add(process)
            assert await models.change({"what": "unload"}) == {"unloaded": ["tiny:1"]}
            assert await asyncio.to_thread(bad.os_process.wait) == -signal.SIGKILL
            assert good.os_process.poll() is None and said == [] and models.are_loaded

    asyncio.run(run())


def test_a_change_that_one_process_cannot_prepare_is_made_by_none(store: Path) -> None:
    settings = Settings(store=store, processes=2)
    plan = plan_row(Plan("load", "tiny", "current", 0.0, None, Store(store).open("tiny-int8")))
    aborted: list[int] = []

    def refuse(plan: dict[str, Any]) -> None:
        raise RequestError("no memory", cause="conflict")

    async def run() -> None:
        group = Group(2)
        models = SharedModels(settings, group, Weights(), SharedBooks(settings, group, no_change))
        models._set_state(STATE)
        async with (
            member(
                1,
                plan=lambda change: plan,
                prepare=lambda plan: {"no_kernels": ""},
                abort=lambda: aborted.append(1),
            ) as first,
            member(2, prepare=refuse, abort=lambda: aborted.append(2)) as second,
        ):
            for process in (first, second):
                group.add(process)
            with pytest.raises(RequestError, match="no memory"):
                await models.change({"what": "load"})
            assert sorted(aborted) == [1, 2]

    asyncio.run(run())


def test_a_failing_process_gets_no_more_connections(store: Path) -> None:
    with socket.socket() as listening, socket.socket() as client, socket.socket() as other:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        supervisor = Supervisor(Settings(store=store, processes=2), (), [listening])

        async def run() -> None:
            async with member(1) as leaving, member(2) as staying:
                for process in (leaving, staying):
                    supervisor._group.add(process)
                    process.is_ready = True
                connections = supervisor._connections
                assert connections._pass_on(client) and leaving.connections == 1
                supervisor._handlers(leaving)["leaving"]()
                assert not supervisor._group.is_ready
                assert connections._pass_on(client) and connections._pass_on(other)
                assert (leaving.connections, staying.connections) == (1, 2)

        asyncio.run(run())


def test_a_connection_for_which_there_is_no_file_descriptor_is_counted_as_closed(store: Path) -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, its:
        worker = Worker(Settings(store=store), socket.socket(), its)
        its.setblocking(False)
        ours.send(CONNECTION)  # as if the system had dropped the descriptor
        worker._receive()
        assert worker._closed == 1


def test_accepting_without_a_free_file_descriptor_goes_on_later() -> None:
    with socket.socket() as listening, socket.socket() as client:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        listening.setblocking(False)
        client.connect(listening.getsockname())
        connections = Connections(Group(1), [listening])

        def fail() -> None:
            raise OSError(24, "Too many open files")

        async def run() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(socket.socket, "accept", lambda self: fail())
                assert connections._accept(listening)
            assert not connections._accept(listening) and connections._held is not None
            connections._held.close()

        asyncio.run(run())


def test_audits_pause_while_the_supervisor_reads_too_slowly(store: Path) -> None:
    ours, its = socket.socketpair()
    sockets, its_sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def run() -> None:
        worker = Worker(Settings(store=store), its, its_sockets)
        worker.run()
        await asyncio.sleep(0)
        for _ in range(10_000):
            worker.write("x" * 1000)
            await asyncio.sleep(0)
            if worker.is_behind:
                break
        assert worker.is_behind and worker.channel.unsent > MAX_UNSENT_BYTES
        ours.setblocking(False)

        for _ in range(10_000):
            try:
                ours.recv(2**20)
            except BlockingIOError:
                if not worker.channel.unsent:
                    break
            await asyncio.sleep(0)
        assert not worker.is_behind

    with ours, its, sockets, its_sockets:
        asyncio.run(run())


def test_a_connection_that_waits_to_be_accepted_is_answered_at_the_end(store: Path) -> None:
    server = Running(store, "--model", "tiny-int8")
    try:
        server.wait()
        os.kill(server.process.pid, signal.SIGSTOP)
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = b'{"input": "good"}'
            head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            os.kill(server.process.pid, signal.SIGTERM)
            os.kill(server.process.pid, signal.SIGCONT)
            client.settimeout(30)
            assert client.recv(2**16).startswith(b"HTTP/1.1 200")
        assert server.process.wait(30) == 0
    finally:
        server.stop()


def test_a_replacement_has_the_keys_with_which_the_server_started(tmp_path: Path, store: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("someone a-key-of-some-length # one; two\n")
    settings = Settings(store=store, api_keys_file=keys)
    part = settings.model_copy(update=Access(settings).keys)
    keys.write_text("other another-key-of-some-length\n")
    scope = {"headers": [(b"authorization", b"Bearer a-key-of-some-length")]}
    assert Access(part).user(scope) == "someone" and part.admin_keys is None
