"""Requests that the event loop cannot start at once are started in rotation over their networks."""

import asyncio
from collections.abc import Callable

from de3.server.http.turns import AT_ONCE, Turns


def order_of(requests: list[str]) -> list[list[str]]:
    """For each iteration of the event loop, the networks whose requests start; all requests arrive in the first.

    requests: the network of each request.
    """

    async def go() -> list[list[str]]:
        turns, rounds = Turns(), [list[str]()]

        def start(network: str) -> Callable[[], None]:
            return lambda: rounds[-1].append(network)

        for network in requests:
            turns.take(network, start(network))
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
        turns, started = Turns(), list[str]()
        for _ in range(500):
            turns.take("crowd", lambda: started.append("crowd"))
        await asyncio.sleep(0)
        turns.take("other", lambda: started.append("other"))
        for _ in range(3):
            await asyncio.sleep(0)
        return started.index("other")

    assert asyncio.run(go()) <= 2 * AT_ONCE + 2
