"""Serving on Ray: the middleware that retries, and options that are refused; lab/tests/test_ray.py starts a cluster."""

import asyncio
from typing import Any

import pytest

from de3.deploy.ray import repeat


def answer_of(middleware: repeat.Repeat, *incoming: dict[str, Any]) -> list[Any]:
    """The ASGI messages that the middleware sends in response to these incoming ones."""
    sent, left = [], list(incoming)

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware({"type": "http", "path": "/classify"}, receive, send))
    return sent


def test_an_unanswered_request_is_repeated_once_unless_its_client_left() -> None:
    calls = []

    async def dies(_: Any, receive: Any, send: Any) -> None:
        calls.append(await receive())
        if len(calls) == 2:
            await send("an answer")

    body = {"type": "http.request", "body": b"{}"}
    assert answer_of(repeat.Repeat(dies), body) == ["an answer"]
    assert calls == [body, body]

    async def waits(_: Any, receive: Any, __: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            calls.append(message)

    calls.clear()
    assert answer_of(repeat.Repeat(waits), body, {"type": "http.disconnect"}) == []
    assert calls == [body]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{"min_replicas": "0"}, {"cores": "two"}, {"tau": "7"}, {"no_such_setting": "1"}]
)
def test_a_wrong_option_is_refused_where_it_was_typed(arguments: dict[str, str]) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    from de3.deploy.ray.app import build

    with pytest.raises(ValueError, match=next(iter(arguments))):
        build(arguments)
