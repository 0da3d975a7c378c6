"""Slots and requests in rotation: no client waits for the queue of another, and no slot is lost."""

import asyncio
import socket
import threading

import httpx
import pytest

from de3.runtime.errors import RequestError
from de3.runtime.fair_queue import Slots
from de3.server.http.classify import parse
from de3.server.http.fair import AT_ONCE, StartQueue
from de3.server.http.protocol import Call
from tests.serving import Server, in_event_loop, until


@in_event_loop
async def test_a_pause_of_the_same_length_follows() -> None:
    lock, loop = Slots(1, pauses=True), asyncio.get_running_loop()
    async with lock.hold("a"):
        started = loop.time()
        while loop.time() < started + 0.02:
            pass
        ended = loop.time()  # while the lock is held, so the pause begins later
    async with lock.hold("a"):
        assert loop.time() >= ended + 0.019


@pytest.mark.parametrize("iterations", range(8))
@in_event_loop
async def test_cancelling_a_task_does_not_lose_the_lock(iterations: int) -> None:
    """Whether it waits for the lock, has just been granted it, or holds it."""
    lock, order = Slots(1), list[int]()

    async def one(number: int) -> None:
        async with lock.hold("a"):
            order.append(number)
            await asyncio.sleep(0 if number == 3 else 60)

    async def pause(iterations: int) -> None:
        for _ in range(iterations):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(one(number)) for number in range(4)]
    await pause(3)
    tasks[1].cancel()
    await pause(3)
    assert order == [0]  # the first one still holds the lock
    tasks[0].cancel()
    await pause(iterations)
    tasks[2].cancel()
    await asyncio.wait_for(tasks[3], 60)
    assert order[-1] == 3


def test_a_body_has_a_limit_on_its_brackets() -> None:
    with pytest.raises(RequestError, match="131072 opening brackets"):
        parse(Call(b'{"input":"a","user":[' + b",".join([b"[]"] * 140_000) + b"]}"))


def test_a_large_body_stops_waiting_when_its_client_leaves(server: Server) -> None:
    body = b'{"input": "good", "user": "' + b"x" * 20_000 + b'", "model": "tiny"}'
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    is_held, is_free = threading.Event(), asyncio.Event()

    async def hold_the_slot() -> None:
        async with server.frontend.parsing.hold("another"):
            is_held.set()
            await is_free.wait()

    with socket.create_connection(("127.0.0.1", server.port)) as s:
        until(lambda: server.listener.connections, "the connection")
        loop = next(iter(server.listener.connections)).loop
        holding = asyncio.run_coroutine_threadsafe(hold_the_slot(), loop)
        assert is_held.wait(60)
        s.sendall(head + body)
        until(lambda: server.service.in_flight == 1, "the body to wait")
    until(lambda: server.metric("de3_rejected_total", cause="client_gone") == 1, "the request to end")
    until(lambda: server.service.in_flight == 0 == server.frontend.bytes_in_flight.total, "its release")
    loop.call_soon_threadsafe(is_free.set)
    holding.result(60)
    assert httpx.post(server.url + "/classify", content=body).status_code == 200


@in_event_loop
async def test_requests_start_at_once_or_in_rotation_over_their_networks() -> None:
    queue, started = StartQueue(), list[str]()

    def add(network: str, requests: int) -> None:
        for _ in range(requests):
            queue.add(network, lambda: started.append(network))

    async def following(rounds: int) -> list[str]:
        """The networks whose requests start in these iterations of the event loop."""
        before = len(started)
        for _ in range(rounds):
            await asyncio.sleep(0)
        return started[before:]

    add("alone", 2 * AT_ONCE)
    assert started == ["alone"] * AT_ONCE
    assert await following(2) == ["alone"] * AT_ONCE
    add("a crowd", 20 * AT_ONCE)
    add("other", 2)
    assert (await following(1)).count("other") == 2
    add("yet another", 1)
    assert "yet another" in await following(2)
    assert len(await following(20)) == 20 * AT_ONCE + 3 - 4 * AT_ONCE


@in_event_loop
async def test_a_client_that_is_not_alone_leaves_slots_to_one_that_has_none() -> None:
    """Whoever has used them for longer."""
    running, ends = list[str](), asyncio.Event()

    async def work(slots: Slots, client: str) -> None:
        async with slots.hold(client):
            running.append(client)
            await ends.wait()

    async def started(slots: Slots, *clients: str) -> list[str]:
        """The clients that get a slot once these ask, too."""
        before = len(running)
        tasks.extend(asyncio.create_task(work(slots, client)) for client in clients)
        for _ in range(2):
            await asyncio.sleep(0)
        return running[before:]

    tasks, shared, alone = list[asyncio.Task[None]](), Slots(16), Slots(16)
    assert await started(shared, "few") == ["few"]
    await asyncio.sleep(0.01)
    assert await started(shared, *["many"] * 20) == ["many"] * 13
    assert await started(shared, "third", "few") == ["third"]
    assert await started(alone, *["one"] * 20) == ["one"] * 15
    assert await started(alone, "another") == ["another"]
    assert await started(Slots(16), *[""] * 20) == [""] * 16
    ends.set()
    await asyncio.gather(*tasks)
    assert len(running) == 64
