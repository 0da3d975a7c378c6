"""A bare ASGI application around the server's tokenizer, kernels and exit rule, or an echo: what all else costs.

`lab.path` starts it with uvicorn, in several processes. In each, an engine thread takes what is there as one group.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import orjson

from de3.exits.reading import ClassReading
from de3.exits.rule import ExitRule
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.store import Store

STORE, MODEL = "DE3_BARE_STORE", "DE3_BARE_MODEL"  # environment variables; without a model, it is an echo
MOST = 32  # texts in a group
JSON = [(b"content-type", b"application/json")]

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Asked = tuple[str, float, "asyncio.Future[tuple[Decision, int]]"]


class Engine:
    """A thread that classifies, as groups, the texts that are pending."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._pending: SimpleQueue[Asked] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        Thread(target=self._run, daemon=True).start()

    async def classify(self, text: str, tau: float) -> tuple[Decision, int]:
        """Where a text exits, and its number of tokens."""
        future: asyncio.Future[tuple[Decision, int]] = self._loop.create_future()
        self._pending.put((text, tau, future))
        return await future

    @cache  # noqa: B019  # there is one engine
    def _rule(self, tau: float) -> ExitRule:
        manifest = self.model.manifest
        return ExitRule(tau, manifest.default_signal, kind=manifest.kind)

    def _run(self) -> None:
        model, deepest = self.model, self.model.manifest.num_layers
        forward = model.encoder.forward
        assert forward is not None, "the model has no kernels"
        while True:
            group = [self._pending.get()]
            while len(group) < MOST and not self._pending.empty():
                group.append(self._pending.get())
            encodings = model.tokenizer.encode([(text, None) for text, _, _ in group])
            passes = []
            for encoding, (text, tau, _) in zip(encodings, group, strict=True):
                tokens = model.tokenizer.short(encoding, (text, None), True)
                passes.append(ForwardPass(tokens, [Decision(model.exits, self._rule(tau), deepest)]))
            forward(passes)
            done = [(one[2], p.decisions[0], len(p.tokens)) for one, p in zip(group, passes, strict=True)]
            self._loop.call_soon_threadsafe(_resolve, done)


def _resolve(done: list[tuple["asyncio.Future[tuple[Decision, int]]", Decision, int]]) -> None:
    for future, decision, tokens in done:
        future.set_result((decision, tokens))


def _body(model: Model, decision: Decision, tokens: int) -> bytes:
    """A response like the server's."""
    reading, rule = decision.readings[-1], decision.rule
    assert isinstance(reading, ClassReading)
    layers = {"layer": reading.layer, "num_layers": model.manifest.num_layers, "reason": decision.reason}
    signal = {"tau": rule.tau, "signal": rule.signal.name, "score": reading.score, "entropy": reading.entropy}
    row = {"index": 0, "label": model.manifest.labels[reading.label]}
    row |= {"probs": [round(p, 6) for p in reading.probs], "num_classes": len(reading.probs)}
    usage = {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    answer = {"id": "classify-0", "object": "list", "created": int(time.time()), "model": model.full_name}
    return orjson.dumps(answer | {"data": [row | {"exit": layers | signal}], "usage": usage})


_engine: list[Engine] = []


async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] == "lifespan":
        await receive()
        if MODEL in os.environ:
            _engine.append(Engine(Model(Store(Path(os.environ[STORE])).open(os.environ[MODEL]), "native")))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return
    body = b"{}"
    if scope["method"] == "POST":
        asked = orjson.loads((await receive())["body"])
        if _engine:
            found = await _engine[0].classify(asked["input"], asked["tau"])
            body = _body(_engine[0].model, *found)
        else:
            body = orjson.dumps(asked)
    await send({"type": "http.response.start", "status": 200, "headers": JSON})
    await send({"type": "http.response.body", "body": body})
