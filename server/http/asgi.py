"""Passes the requests of a connection to an ASGI application."""

from collections.abc import Coroutine
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from de3.runtime.background import failures
from de3.runtime.errors import RequestError
from de3.server.http.connection import Connection, Handler


def handler(app: ASGIApp) -> Handler:
    """A handler that passes requests to an ASGI application."""

    def handle(connection: Connection, scope: Scope, body: bytes | RequestError) -> Coroutine[Any, Any, None]:
        return AsgiRequest(connection, scope, body).run(app)

    return handle


class AsgiRequest:
    """The ASGI `receive` and `send` of one request; writes the response to the connection."""

    __slots__ = ("_body", "_chunked", "_connection", "_is_head", "_over", "_scope", "_start")

    def __init__(self, connection: Connection, scope: Scope, body: bytes | RequestError) -> None:
        self._connection, self._scope = connection, scope
        self._body: bytes | RequestError | None = body
        self._start: Message | None = None  # head of the response, until its body begins
        self._chunked = False
        self._is_head = scope["method"] == "HEAD"
        self._over = False

    async def run(self, app: ASGIApp) -> None:
        """Run the application; abort the connection if the response is left incomplete."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:  # the framework re-raises it after responding with 500
            failures.exception("%s %s failed", self._scope["method"], self._scope["path"][:100])
        finally:
            if not self._over:
                self._over = True
                self._connection.abort()  # the response is incomplete

    async def receive(self) -> Message:
        """The complete body; after that, a disconnect message once the response is written or the client is gone.

        Raises RequestError if the body could not be read.
        """
        body, self._body = self._body, None
        if isinstance(body, RequestError):
            raise body
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        if not (self._over or self._connection.is_gone):
            await self._connection.response_ended()
        return {"type": "http.disconnect"}

    def respond(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Write a whole response, whose headers include its length; cheaper than two calls to send()."""
        connection = self._connection
        self._over = True
        if connection.is_gone:
            return
        connection.write(status, headers, b"" if self._is_head else body)
        connection.responded()

    async def send(self, message: Message) -> None:
        """Write a part of the response; unless it is the last, wait until the client has caught up.

        The head is held back and written with the first part of the body.
        """
        connection = self._connection
        if message["type"] == "http.response.start":
            self._start = message
            return
        if connection.is_gone:
            self._over = True
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._start is not None:
            self._write_head(self._start, body, more)
            self._start = None
        elif not self._is_head:
            connection.write_more(self._framed(body, more))
        if more:
            await connection.drain()
        else:
            self._over = True
            connection.responded()

    def _write_head(self, start: Message, body: bytes, more: bool) -> None:
        headers = list(start.get("headers", ()))
        status = start["status"]
        if b"content-length" not in dict(headers) and status not in (204, 304):
            self._chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        self._connection.write(status, headers, b"" if self._is_head else self._framed(body, more))

    def _framed(self, body: bytes, more: bool) -> bytes:
        if not self._chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk if more else chunk + b"0\r\n\r\n"
