"""A request that ends early, wherever it is, releases everything that it holds."""

import asyncio
import json
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest

from de3.runtime.fields import LARGE_BODY_BYTES
from de3.server.http.app import PROTOCOLS
from de3.server.http.endpoint import answer
from de3.server.http.frontend import Frontend
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import in_event_loop

MOST_WAITS = 100
BODIES: dict[str, dict[str, Any]] = {
    "one text": {"input": "a good film"},
    "many texts, some long": {"input": ["a good film", "bad " * 300] * 8, "long": "windows"},
    "a budget": {"input": ["good", "bad"], "latency_budget_ms": 5000},
    "two models": {"input": "good", "models": ["tiny", {"model": "tiny", "tau": 0}]},
    "a large body": {"input": ["good " * (LARGE_BODY_BYTES // 10)] * 3},
    "a text that fails": {"input": ["good", "bad " * 300], "long": "error"},
}


class Left:
    """A coroutine whose task is cancelled at its nth wait, as when its client leaves.

    Attributes:
        waits: how often it has waited.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None], last: int) -> None:
        self._coroutine, self._last, self.waits = coroutine, last, 0

    def __await__(self) -> Generator[Any, Any, None]:
        error: BaseException | None = None
        while True:
            try:
                waited_for = self._coroutine.send(None) if error is None else self._coroutine.throw(error)
            except StopIteration:
                return
            self.waits += 1
            if self.waits == self._last and (task := asyncio.current_task()) is not None:
                task.cancel()
            try:
                yield waited_for
                error = None
            except BaseException as thrown:
                error = thrown

    async def run(self) -> None:
        await self


def held(service: Service, frontend: Frontend) -> dict[str, int]:
    """What requests and audits hold."""
    admission, auditor = service.admission, service.audits.get(service.models.all[0])
    assert auditor is not None
    return {
        "requests": service.in_flight,
        "texts": admission.texts.total + admission._in_flight + len(admission._batches),
        "texts for an upstream": admission.waiting.total,
        "queue": len(service.engine.queue),
        "deadlines": len(service.engine.deadlines._admitted),
        "audits": auditor.pending,
        "parsing": 1 - frontend.parsing._free,
    }


@pytest.mark.parametrize("kind", BODIES)
@in_event_loop
async def test_a_request_whose_client_leaves_at_any_wait_holds_nothing(store: Path, kind: str) -> None:
    service = Service(Settings(store=store, models=["tiny"], threads=1, audit_share=1.0))
    await service.load(lambda: None)
    frontend, body, statuses = Frontend(service, PROTOCOLS), json.dumps(BODIES[kind]).encode(), list[int]()

    async def receive() -> Any:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)
        statuses.extend([message["status"]] if "status" in message else [])

    for last in range(1, MOST_WAITS):
        scope = {"type": "http", "method": "POST", "path": "/classify", "headers": [], "client": ("::1", 1)}
        route = frontend.route(scope)
        assert route is not None
        request = Left(answer(scope, receive, send, frontend, route), last)
        task = asyncio.create_task(request.run())
        await asyncio.wait([task])
        assert task.cancelled() == (request.waits == last)
        async with asyncio.timeout(10):
            while any(held(service, frontend).values()):
                await asyncio.sleep(0.001)
        if request.waits < last:
            break
    assert request.waits < last and last > 3
    assert statuses[-1] == (422 if kind == "a text that fails" else 200)
    service.state = "stopping"
    await asyncio.to_thread(service.engine.stop)
