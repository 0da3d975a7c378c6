"""uvicorn's HTTP/1.1, with limits on a request's head, and on the time that an answer may take to be read."""

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 32 * 1024
HEAD_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0


class _Parser:
    """httptools' parser, for which a request that asks for an upgrade is one like any other.

    By itself it takes what follows the head for another protocol, and a body is lost: Java's HTTP client asks
    for HTTP/2 in this way with every first request.
    """

    def __init__(self, protocol: "Http") -> None:
        self._protocol = protocol
        self._begin()

    def _begin(self) -> None:
        self._parser = HttpRequestParser(self._protocol)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def feed_data(self, data: bytes) -> None:
        """Parse what came."""
        while True:
            try:
                return self._parser.feed_data(data)
            except HttpParserUpgrade as upgrade:
                if not self._protocol.asks_for_upgrade():
                    raise  # CONNECT, which no route allows
                data = self._protocol.head_without_upgrade() + data[upgrade.args[0] :]
                self._begin()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)


class Http(HttpToolsProtocol):
    """A connection is closed when a head does not come in time, answered 400 when that is too large, and cut
    when a client does not read what is sent to it: an answer that does not fit into the system's buffers must
    be read within WRITE_TIMEOUT_S, however slowly it trickles.

    It is in the request's scope as `de3.connection`. Whoever answers may set `on_gone`, to be called when the
    client closes the connection: waiting for ASGI's disconnect message would cost a task for each request.
    """

    on_gone: Callable[[], None] | None = None
    _head_bytes = 0
    _head_timer: TimerHandle | None = None
    _write_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Start waiting for the first head."""
        super().connection_made(transport)
        self.parser: Any = _Parser(self)
        self._await_head()

    def pause_writing(self) -> None:
        """The client does not read: it has so long to begin again."""
        super().pause_writing()
        self._cut_later()

    def resume_writing(self) -> None:
        """It reads."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one whose last answer was never read would else stay half closed."""
        super().timeout_keep_alive_handler()
        self._cut_later()

    def shutdown(self) -> None:
        """Close, if nothing is under way; what is not read then is cut off later."""
        super().shutdown()
        transport: Any = self.transport
        if transport.is_closing():
            self._cut_later()

    def _cut_later(self) -> None:
        if self._write_timer is None:
            transport: Any = self.transport
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting, and tell whoever answers."""
        self._head_came()
        if self._write_timer is not None:
            self._write_timer.cancel()
        if self.on_gone is not None:
            self.on_gone()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request begins: its head must follow."""
        self._await_head()
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a part of the request line."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole; one with an upgrade will come again without."""
        self._head_came()
        if self.asks_for_upgrade():
            return
        self.scope["de3.connection"] = self  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is whole."""
        if not self.asks_for_upgrade():
            super().on_message_complete()

    def asks_for_upgrade(self) -> bool:
        """Whether the head wishes for another protocol."""
        return bool(self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT")

    def head_without_upgrade(self) -> bytes:
        """The head that came, without the wish for another protocol."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        wishes = (b"upgrade", b"http2-settings")
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() not in wishes]
                lines.append(b"connection: " + b",".join(kept))
            elif name not in wishes:
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def _count(self, data: bytes) -> None:
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError(
                "head too large"
            )  # the parser ends with an error, which uvicorn answers with 400

    def _await_head(self) -> None:
        self._head_came()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        transport: Any = self.transport
        transport.close()
