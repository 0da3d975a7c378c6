"""Large bodies are parsed one at a time, with pauses and clients in rotation, and none is forgotten."""

import asyncio
import socket
from pathlib import Path

import httpx
import pytest

from de3.server.errors import RequestError
from de3.server.http.classify import parse
from de3.server.http.errors import STATUSES
from de3.server.http.lane import Lane
from de3.server.http.protocol import Call
from tests.serving import serving, until


def test_one_at_a_time_and_clients_in_rotation() -> None:
    async def go() -> list[str]:
        lane, order, inside = Lane(), [], 0

        async def one(client: str) -> None:
            nonlocal inside
            async with lane.turn(client):
                assert inside == 0
                inside += 1
                await asyncio.sleep(0)
                order.append(client)
                inside -= 1

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for client in ["greedy"] * 5 + ["other", "third"]:
                tasks.create_task(one(client))
        assert not lane._pending
        return order

    order = asyncio.run(go())
    assert sorted(order) == ["greedy"] * 5 + ["other", "third"]
    assert order.index("other") < 3 and order.index("third") < 4


def test_cancelling_a_task_does_not_lose_the_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        lane, order, release = Lane(), list[int](), asyncio.Event()

        async def one(number: int) -> None:
            async with lane.turn("a"):
                order.append(number)
                await release.wait()

        first, waiting, granted, last = tasks = [asyncio.create_task(one(n)) for n in range(4)]
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        for _ in range(3):
            await asyncio.sleep(0)
        assert order == [0]  # the turn is still the first one's
        pass_on = lane._pass_on

        def grant_and_cancel() -> None:
            monkeypatch.undo()
            pass_on()
            granted.cancel()

        monkeypatch.setattr(lane, "_pass_on", grant_and_cancel)
        release.set()
        await asyncio.wait(tasks, timeout=10)
        assert first.done() and granted.cancelled() and last.done() and order == [0, 3]
        await asyncio.wait_for(one(4), 10)

    asyncio.run(go())


def test_a_turn_is_followed_by_a_pause_of_the_same_length() -> None:
    async def go() -> None:
        lane, loop = Lane(), asyncio.get_running_loop()
        async with lane.turn("a"):
            started = loop.time()
            while loop.time() < started + 0.05:
                pass
            ended = loop.time()  # inside the turn, so the pause begins later
        async with lane.turn("a"):
            assert loop.time() >= ended + 0.049

    asyncio.run(go())


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"input":"a",' + b",".join(b'"k%06d":0' % i for i in range(70_000)) + b"}", 422, "k000000"),
        (b'{"input":[' + b",".join([b'"a"'] * 250_000) + b"]}", 422, "250000 texts, at most 256"),
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
        lane = server.frontend.lane
        lane._is_free = False  # the lane is taken and not released
        with socket.create_connection(("127.0.0.1", server.port)) as s:
            s.sendall(
                b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            until(lambda: lane._pending, "the body to wait")
        until(lambda: server.metric("de3_rejected_total", cause="client_gone") == 1, "the request to end")
        until(lambda: server.service.in_flight == 0 == server.frontend.bytes_in_flight.total, "its release")
        lane._is_free = True
        assert httpx.post(server.url + "/classify", content=body).status_code == 200
