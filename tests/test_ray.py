"""Serving on Ray: the retrying middleware, refused options, a lost client; lab/tests/test_ray.py starts a cluster."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from de3.deploy.ray import retry
from de3.server.http.app import PROTOCOLS, create_app
from de3.server.http.frontend import Frontend
from de3.server.service import Service
from de3.server.settings import Settings


def answer_of(middleware: retry.Retry, *incoming: dict[str, Any]) -> list[Any]:
    """The ASGI messages that the middleware sends in response to these incoming ones."""
    sent, left = [], list(incoming)

    async def receive() -> Any:
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(middleware({"type": "http", "path": "/classify"}, receive, send))
    return sent


def test_an_unanswered_request_is_retried_unless_its_client_left() -> None:
    calls = []

    async def dies(_: Any, receive: Any, send: Any) -> None:
        calls.append(await receive())
        await send({"type": "http.response.start", "status": 199 + len(calls)})
        if len(calls) == 2:
            await send({"type": "http.response.body", "body": b"an answer"})

    body = {"type": "http.request", "body": b"{}"}
    assert answer_of(retry.Retry(dies), body) == [
        {"type": "http.response.start", "status": 201},
        {"type": "http.response.body", "body": b"an answer"},
    ]
    assert calls == [body, body]

    async def waits(_: Any, receive: Any, __: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            calls.append(message)

    calls.clear()
    assert answer_of(retry.Retry(waits), body, {"type": "http.disconnect"}) == []
    assert calls == [body]


@pytest.mark.slow
def test_a_wrong_option_is_refused_where_it_was_typed() -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    from de3.deploy.ray.app import build

    for arguments in ({"min_replicas": "0"}, {"cores": "two"}, {"tau": "7"}, {"no_such_setting": "1"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            build(arguments)


@pytest.mark.slow
def test_a_client_that_leaves_in_the_middle_of_its_body_causes_no_error() -> None:
    """Ray's `receive` raises an error then, in some of the cases."""
    pytest.importorskip("ray", reason="ray is not installed (extra: ray)")
    from ray.exceptions import TaskCancelledError

    from de3.deploy.ray.app import _on_ray

    key = "root-has-a-long-key-too"
    settings = Settings(store=Path("models"), admin_keys=SecretStr(f"root {key}"))
    service, sent, left = Service(settings), list[Any](), [b'{"ver']

    async def receive() -> Any:
        if not left:
            raise TaskCancelledError
        return {"type": "http.request", "body": left.pop(), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    path, headers = "/v1/models/sst2/load", [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("127.0.0.1", 1)}
    asyncio.run(_on_ray(create_app(Frontend(service, PROTOCOLS)))(scope, receive, send))
    assert sent == []
    cause = {"cause": "client_gone"}
    assert service.metrics.registry.get_sample_value("de3_rejected_total", cause) == 1
