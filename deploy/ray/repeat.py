"""Repeats, in Ray's proxy, a request whose replica died under it: to classify changes nothing.

Set RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.ray.repeat:middlewares where Ray is started.
"""

import asyncio
import logging
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.app import PROTOCOLS
from server.http.frontend import route_path

log = logging.getLogger("ray.serve")
TRIES = 2
MAX_BODY_BYTES = 2**20  # larger bodies are not kept, and so not repeated,
MAX_WAIT_S = 5.0  # nor those that come so slowly


class Repeat:
    """ASGI middleware: asks again where the proxy ends without an answer, as it does when a replica dies."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or route_path(scope) not in PROTOCOLS:
            await self._app(scope, receive, send)
            return
        read, whole = await _read(receive)
        over = False  # it is answered, or nobody waits for an answer

        async def reply(message: Message) -> None:
            nonlocal over
            over = True
            await send(message)

        for number in range(TRIES if whole else 1):
            if number:
                log.warning("a replica gave no answer: asking again")
            left = list(read)

            async def again(left: list[Message] = left) -> Message:
                nonlocal over
                message = left.pop(0) if left else await receive()
                over = over or message["type"] == "http.disconnect"
                return message

            await self._app(dict(scope), again, reply)
            if over:
                return


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """A request's messages up to the end of its body, or to the most that is kept; whether that is all."""
    read, size = [], 0
    with suppress(TimeoutError):
        async with asyncio.timeout(MAX_WAIT_S):
            while size <= MAX_BODY_BYTES:
                message = await receive()
                read.append(message)
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return read, message["type"] == "http.request"
    return read, False


def middlewares() -> list[Middleware]:
    """What Ray's proxy is to use."""
    return [Middleware(Repeat)]
