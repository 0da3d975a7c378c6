"""Middlewares for Ray's proxy that retry requests to a replica that died, and drop unsafe request ids.

Classification has no side effects, so its requests can be retried.
Start Ray with RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=de3.deploy.ray.retry:middlewares.
"""

import asyncio
import logging
from contextlib import suppress

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from de3.server.http.app import PROTOCOLS
from de3.server.http.exchange import HEADER, WELL_FORMED
from de3.server.http.frontend import route_path

log = logging.getLogger("ray.serve")
TRIES = 4  # until Ray notices, the next replica may be dead, too
PAUSE_S = 0.05  # before the first retry; each further pause is four times as long
MAX_BODY_BYTES = 2**20  # requests with larger bodies are not buffered and not retried
MAX_WAIT_S = 5.0  # the same holds for bodies that take longer to arrive


class Retry:
    """ASGI middleware that retries a classification if the proxy returns no answer, for example when a replica dies.

    The status and headers are held until the first part of the body arrives: a replica may die between the two.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or route_path(scope) not in PROTOCOLS:
            await self._app(scope, receive, send)
            return
        messages, is_complete = await _read(receive)
        is_done = False  # a part of the body was sent, or the client has disconnected
        start: Message | None = None  # status and headers, unsent

        async def reply(message: Message) -> None:
            nonlocal is_done, start
            if message["type"] == "http.response.start":
                start = message
                return
            is_done = True
            if start is not None:
                await send(start)
                start = None
            await send(message)

        for attempt in range(TRIES if is_complete else 1):
            if attempt:
                log.warning("no answer from a replica: retrying")
                await asyncio.sleep(PAUSE_S * 4 ** (attempt - 1))
            unread, start = list(messages), None

            async def replay(unread: list[Message] = unread) -> Message:
                nonlocal is_done
                message = unread.pop(0) if unread else await receive()
                is_done = is_done or message["type"] == "http.disconnect"
                return message

            await self._app(dict(scope), replay, reply)
            if is_done:
                return


async def _read(receive: Receive) -> tuple[list[Message], bool]:
    """The messages of a request up to the end of its body or a limit (size, time), and whether the body is complete."""
    messages, size = [], 0
    with suppress(TimeoutError):
        async with asyncio.timeout(MAX_WAIT_S):
            while size <= MAX_BODY_BYTES:
                message = await receive()
                messages.append(message)
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return messages, message["type"] == "http.request"
    return messages, False


class SafeIds:
    """ASGI middleware that drops malformed X-Request-ID headers, which Ray would echo.

    Ray generates an id for requests without one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            scope["headers"] = [
                (name, value)
                for name, value in scope["headers"]
                if name != HEADER or WELL_FORMED.fullmatch(value)
            ]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """The middlewares for Ray's proxy."""
    return [Middleware(Retry), Middleware(SafeIds)]
