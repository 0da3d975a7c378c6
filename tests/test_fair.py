"""Large bodies are parsed, and requests started, in rotation.

Bodies are parsed one at a time, with pauses and clients in rotation, and none is forgotten. Requests that the event
loop cannot start at once are started in rotation over their networks.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.server.errors import RequestError
from de3.server.fair_queue import Slots
from de3.server.http.classify import parse
from de3.server.http.errors import STATUSES
from de3.server.http.fair import AT_ONCE, StartQueue
from de3.server.http.protocol import Call
from tests.serving import in_event_loop, serving, until


def test_one_at_a_time_and_clients_in_rotation() -> None:
    async def go() -> list[str]:
        lock, order, inside = Slots(1, pauses=True), [], 0

        async def one(client: str) -> None:
            nonlocal inside
            async with lock.hold(client):
                assert inside == 0
                inside += 1
                await asyncio.sleep(0)
                order.append(client)
                inside -= 1

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for client in ["greedy"] * 5 + ["other", "third"]:
                tasks.create_task(one(client))
        assert lock._waiting.first() is None
        return order

    order = asyncio.run(go())
    assert sorted(order) == ["greedy"] * 5 + ["other", "third"]
    assert order.index("other") < 3 and order.index("third") < 4


def test_cancelling_a_task_does_not_lose_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        lock, order, release = Slots(1, pauses=True), list[int](), asyncio.Event()

        async def one(number: int) -> None:
            async with lock.hold("a"):
                order.append(number)
                await release.wait()

        first, waiting, granted, last = tasks = [asyncio.create_task(one(n)) for n in range(4)]
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        for _ in range(3):
            await asyncio.sleep(0)
        assert order == [0]  # the first one still holds the lock
        pass_on = lock._release

        def grant_and_cancel(client: Any) -> None:
            monkeypatch.undo()
            pass_on(client)
            granted.cancel()

        monkeypatch.setattr(lock, "_release", grant_and_cancel)
        release.set()
        await asyncio.wait(tasks, timeout=10)
        assert first.done() and granted.cancelled() and last.done() and order == [0, 3]
        await asyncio.wait_for(one(4), 10)

    asyncio.run(go())


def test_a_pause_of_the_same_length_follows() -> None:
    async def go() -> None:
        lock, loop = Slots(1, pauses=True), asyncio.get_running_loop()
        async with lock.hold("a"):
            started = loop.time()
            while loop.time() < started + 0.05:
                pass
            ended = loop.time()  # while the lock is held, so the pause begins later
        async with lock.hold("a"):
            assert loop.time() >= ended + 0.049

    asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"input":"a",' + b",".join(b'"k%06d":0' % i for i in range(70_000)) + b"}", 422, "k000000"),
        (b'{"input":[' + b",".join([b'"a"'] * 250_000) + b"]}", 422, "250000 texts; at most 256"),
        (b'{"input":"a","user":[' + b",".join([b"[]"] * 140_000) + b"]}", 422, "131072 opening brackets"),
        (b'{"input":"a","user":"' + b"x" * 10**6, 400, "not JSON"),
    ],
)
def test_cheap_checks_come_first(body: bytes, status: int, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        parse(Call(body))
    assert STATUSES[error.value.cause] == status


def test_a_large_body_stops_waiting_when_its_client_leaves(store: Path) -> None:
    body = b'{"input": "good", "user": "' + b"x" * 20_000 + b'"}'
    with serving(store, models=["tiny"]) as server:
        lock = server.frontend.parsing
        lock._free = 0  # it is held, and not released
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            until(lambda: lock._waiting.first() is not None, "the body to wait")
        until(lambda: server.metric("de3_rejected_total", cause="client_gone") == 1, "the request to end")
        until(lambda: server.service.in_flight == 0 == server.frontend.bytes_in_flight.total, "its release")
        lock._free = 1
        assert httpx.post(server.url + "/classify", content=body).status_code == 200


def order_of(requests: list[str]) -> list[list[str]]:
    """For each iteration of the event loop, the networks whose requests start; all requests arrive in the first.

    requests: the network of each request.
    """

    async def go() -> list[list[str]]:
        queue, rounds = StartQueue(), [list[str]()]

        def start(network: str) -> Callable[[], None]:
            return lambda: rounds[-1].append(network)

        for network in requests:
            queue.add(network, start(network))
        while sum(map(len, rounds)) < len(requests) and len(rounds) < len(requests):
            rounds.append([])
            await asyncio.sleep(0)
        return rounds

    return asyncio.run(go())


def test_a_lone_client_starts_its_requests_without_delay() -> None:
    assert order_of(["a"] * AT_ONCE) == [["a"] * AT_ONCE]
    assert order_of(["a"] * 3 * AT_ONCE) == [["a"] * AT_ONCE] * 3


def test_beside_a_crowd_another_network_starts_in_the_next_iteration() -> None:
    rounds = order_of(["crowd"] * 1000 + ["other", "other"])
    assert rounds[0] == ["crowd"] * AT_ONCE
    assert rounds[1].count("other") == 2
    assert len(rounds) == -(-1002 // AT_ONCE)


def test_a_later_request_waits_only_behind_its_own_network() -> None:
    async def go() -> int:
        queue, started = StartQueue(), list[str]()
        for _ in range(500):
            queue.add("crowd", lambda: started.append("crowd"))
        await asyncio.sleep(0)
        queue.add("other", lambda: started.append("other"))
        for _ in range(3):
            await asyncio.sleep(0)
        return started.index("other")

    assert asyncio.run(go()) <= 2 * AT_ONCE + 2


@in_event_loop
async def test_a_client_that_is_not_alone_leaves_slots_to_one_that_has_none() -> None:
    """Whoever has used them for longer."""
    running, ends = list[str](), asyncio.Event()

    async def work(slots: Slots, client: str) -> None:
        async with slots.hold(client):
            running.append(client)
            await ends.wait()

    async def started(slots: Slots, *clients: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(work(slots, client)) for client in clients]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return tasks

    shared, alone = Slots(16), Slots(16)
    tasks = await started(shared, "few")
    await asyncio.sleep(0.01)
    tasks += await started(shared, *["many"] * 20)
    assert running == ["few"] + ["many"] * 13
    tasks += await started(shared, "third", "few")
    assert running[14:] == ["third"]
    tasks += await started(alone, *["one"] * 20)
    assert running[15:] == ["one"] * 15
    tasks += await started(alone, "another")
    assert running[30:] == ["another"]
    tasks += await started(Slots(16), *[""] * 20)
    assert running[31:] == [""] * 16
    ends.set()
    await asyncio.gather(*tasks)
    assert len(running) == 64
