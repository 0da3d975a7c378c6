"""HTTP/1.1 for one client, under limits: the protocol that uvicorn runs for each connection.

One request at a time: pipelined requests stay unparsed until the response before them is written and read.
The application starts when a request is complete, so that an unfinished body occupies a connection and
nothing else. Every part of a request is limited in raw bytes and in time. A connection on which a request
cannot be read to its end is closed once the response is sent.

httptools (Node's llhttp) parses. It is fed up to the end of a message and no further: a head, and a chunked
body, end with an empty line, and llhttp accepts no line ends but CR LF, so the end can be found beforehand.
"""

import asyncio
import re
import socket
from collections.abc import Callable
from http import HTTPStatus
from math import inf
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from starlette.types import Scope

from de3.server.errors import RequestError
from de3.server.http import errors
from de3.server.http.asgi import AsgiRequest

if TYPE_CHECKING:
    from de3.server.http.listener import Listener

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 100
# Of a chunked body, beside the body itself: sizes, extensions, trailers.
MAX_FRAMING_BYTES = 64 * 1024
MIN_CHUNK_BYTES = 64  # on average, after the first MAX_SMALL_CHUNKS
MAX_SMALL_CHUNKS = 1024
MAX_PIPELINED_BYTES = 16 * 1024  # read before the response is written: more stays in the system's buffers
MAX_DISCARDED_BYTES = 2**24  # read after a refusal, so that a client that is still sending sees the response
SOCKET_BUFFER_BYTES = 2**16
WRITE_BUFFER_BYTES = 2**14  # of a response: a client with more unread counts as one that does not read
MIN_READ_PAUSE_S = 0.001  # a shorter pause is not worth a timer
HEAD_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 5.0
WRITE_TIMEOUT_S = 30.0
LINGER_S = 2.0

# What a connection waits for: a head, a body, the application's response, or the client to close.
HEAD, BODY, RESPONSE, LINGER = range(4)
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
# An upgrade is not offered: the header is ignored.
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
_END = b"\r\n\r\n"


class Connection(asyncio.Protocol):
    """A client's connection.

    It is in a request's scope as `de3.connection`. The endpoint may set `on_gone`, which is called when the
    client closes the connection: waiting for ASGI's disconnect message would cost a task for each request.

    Attributes:
        state: what it waits for.
        deadline: when the client must have sent what is awaited (monotonic seconds).
        write_deadline: when the client must have read what was written (monotonic seconds).
        address: the client's.
        opened_at: monotonic seconds.
        responses: how many requests were answered.
        client: whose request it is.
        body_bytes: bytes of its body that count as in flight.
    """

    on_gone: Callable[[], None] | None = None

    def __init__(
        self,
        listener: "Listener",
        root_path: str,
        server_state: Any,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self._listener, self._root_path = listener, root_path
        self._server_state, self._app_state = server_state, app_state
        self._transport: Any = None
        self._parser = HttpRequestParser(self)
        self.state, self.address = HEAD, ""
        self.opened_at, self.responses = monotonic(), 0
        self.deadline, self.write_deadline = self.opened_at + HEAD_TIMEOUT_S, inf
        self._data = b""  # read and not parsed
        self._searched = 0  # of it, without the end of a head
        self._blank = 0  # bytes of empty lines before a head
        self._reading_paused = False
        self._awaits_turn = False  # for a pipelined request
        self._keep_alive = False
        self._scope: Scope = {}
        self._resumed: asyncio.Event | None = None  # set once the client reads again
        self._closing = False  # after the current response
        self._gone = False
        self._discarded = 0
        self.client, self.body_bytes = "", 0
        self._request: AsgiRequest | None = None

    # What uvicorn and the event loop call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first head."""
        self._transport = transport
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self._local = (str(local[0]), int(local[1])) if isinstance(local, tuple) else None
        self.address = self._listener.gate.address(self._peer)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        # The system would let each connection grow to megabytes.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self._server_state.connections.add(self)
        self._listener.opened(self)

    def connection_lost(self, _: Exception | None) -> None:
        """Tell the endpoint, and release everything."""
        self._gone = True
        self._server_state.connections.discard(self)
        self._listener.closed(self)
        self._release()
        self.deadline = self.write_deadline = inf
        self._scope = {}  # which refers back to this
        if self.on_gone is not None:
            self.on_gone()
        if self._resumed is not None:
            self._resumed.set()
        if self._request is not None:
            self._request.end()

    def shutdown(self) -> None:
        """Close now if there is no request, else after its response."""
        if self.state in (BODY, RESPONSE):
            self._closing = True
        else:
            self._close()

    def pause_writing(self) -> None:
        """The client does not read: start its time-out."""
        self._resumed = asyncio.Event()
        self.write_deadline = monotonic() + WRITE_TIMEOUT_S
        self._listener.paused(self)

    def resume_writing(self) -> None:
        """The client reads again."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None
        if not self._transport.is_closing():
            self.write_deadline = inf
        self._listener.resumed(self)
        if not self._awaits_turn:
            self._resume_parsing()

    def data_received(self, data: bytes) -> None:
        """Parse the data, or keep it until the current request is answered."""
        if self.state == LINGER:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.abort()
            return
        if self.state == HEAD and not self._data and not self._blank:
            self._wait(HEAD, HEAD_TIMEOUT_S)
        self._data = self._data + data if self._data else data
        if self.state == RESPONSE or self._resumed is not None or self._awaits_turn:
            if len(self._data) > MAX_PIPELINED_BYTES:
                self._pause_reading()
        else:
            self._advance()

    # Deadlines

    def _wait(self, state: int, seconds: float) -> None:
        self.state, self.deadline = state, monotonic() + seconds

    def expire(self, now: float) -> None:
        """End what is past its deadline."""
        if self.write_deadline < now or self.state == LINGER:
            self.abort()
        elif self.state == BODY:
            limit = self._listener.body_timeout_s
            error = RequestError(f"the body did not arrive within {limit:g} s", cause="slow_body")
            self._start(error)
        else:
            self._close()

    def _close(self) -> None:
        """Close once what was written is sent; abort if that takes too long."""
        self.deadline = inf
        self.write_deadline = min(self.write_deadline, monotonic() + WRITE_TIMEOUT_S)
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._listener.closed(self)
        self._transport.abort()

    def _linger(self) -> None:
        """Close, after a client that is still sending had time to see the response."""
        self._release()
        self._data = b""
        self._wait(LINGER, LINGER_S)
        self._resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_body(self) -> None:
        if not self._gone and self.state == BODY:
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused:
            self._reading_paused = False
            self._transport.resume_reading()

    def unread(self) -> int:
        """Bytes written that the client has not read."""
        return int(self._transport.get_write_buffer_size())

    # Parsing

    def _advance(self) -> None:
        try:
            if self.state == HEAD and self._data:
                self._take_head()
            if self.state == BODY and self._data:
                self._take_body()
        except RequestError as error:  # in a body
            self._start(error)
        except HttpParserUpgrade:
            self._refuse(405, "CONNECT is not allowed; see /docs")
        except (HttpParserError, ValueError) as error:
            reason = str(error.__context__ or error)[:200]  # httptools wraps what callbacks raise
            self._refuse(400, f"not a well-formed HTTP/1.1 request: {reason}")

    def _take_head(self) -> None:
        """Parse a head, if it is complete. Raises ValueError or HttpParserError."""
        data = self._data
        if data[:1] in (b"\r", b"\n"):  # empty lines before a request are allowed (RFC 9112, 2.2)
            left = data.lstrip(b"\r\n")
            self._blank += len(data) - len(left)
            self._data = data = left
        if data and not 65 <= data[0] <= 90:  # TLS, for example, whose client would wait for a response
            raise ValueError("it does not begin with a method")
        end = data.find(_END, self._searched)
        if self._blank + (len(data) if end < 0 else end) > MAX_HEAD_BYTES:
            raise ValueError(f"its head is larger than {MAX_HEAD_BYTES} bytes")
        if end < 0:
            self._searched = max(0, len(data) - len(_END) + 1)
            return
        if data.count(b"\r\n", 0, end) > MAX_HEADERS:
            raise ValueError(f"its head has more than {MAX_HEADERS} headers")
        head, self._data = data[: end + len(_END)], data[end + len(_END) :]
        self._searched = self._blank = 0
        if b"upgrade:" in head.lower():
            head = _UPGRADE.sub(b"", head)
        self._headers: list[tuple[bytes, bytes]] = []
        self._url, self._is_complete, self._length = b"", False, -1
        self._expects_continue = False
        self._body: list[bytes] = []
        self._size = self._framing = 0
        self._is_head = True
        self._parser.feed_data(head)
        self._is_head = False
        self._begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is ignored."""
        if not self._is_head:
            return
        name = name.lower()
        self._headers.append((name, value))
        if name == b"content-length":
            self._length = int(value)  # llhttp takes digits only
        elif name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = self._parser.get_http_version() == "1.1"

    def on_headers_complete(self) -> None:
        """llhttp forgets what the head said once the message is complete."""
        self._keep_alive = bool(self._parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)
        self._size += len(body)
        if self._length < 0 and len(self._body) > MAX_SMALL_CHUNKS + self._size // MIN_CHUNK_BYTES:
            raise ValueError("too many small chunks")

    def on_message_complete(self) -> None:
        """The request is complete."""
        self._is_complete = True

    def _begin(self) -> None:
        """A head is complete: wait for its body, or start now. Raises ValueError or HttpParserError."""
        url = parse_url(self._url)
        raw_path = url.path or b"/"  # an absolute URL may have none
        path = raw_path.decode("ascii")
        version = self._parser.get_http_version()
        self._keep_alive = self._keep_alive and version != "1.0"
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self._local,
            "client": self._peer,
            "scheme": "http",
            "method": self._parser.get_method().decode("ascii"),
            "root_path": self._root_path,
            "path": self._root_path + (unquote(path) if "%" in path else path),
            "raw_path": self._root_path.encode("ascii") + raw_path,
            "query_string": url.query or b"",
            "headers": self._headers,
            "state": self._app_state.copy(),
            "de3.connection": self,
            "de3.started": perf_counter(),
        }
        self._scope = scope
        if self._is_complete:
            self._start(b"")
            return
        refusal: RequestError | None = None
        client = None
        try:
            client = self._listener.gate.admit(scope)
        except RequestError as error:
            refusal = error
        if self._length > self._listener.max_body_bytes:
            refusal = refusal or self._too_large()
        # A body that was received already is read in any case, so that the connection can be reused.
        if (client is None or refusal) and not 0 <= self._length <= len(self._data):
            self._start(refusal or b"")
            return
        self.client = client or ""
        self._wait(BODY, self._listener.body_timeout_s)
        if self._expects_continue and not self._data:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _take_body(self) -> None:
        """Parse what was received of a body. Raises RequestError, ValueError or HttpParserError."""
        data = self._data
        if self._length >= 0:
            left = self._length - self._size
            piece, self._data = data[:left], data[left:]
            self._count_body(len(piece))
            self._parser.feed_data(piece)
        else:
            self._take_chunks()
        if not self._is_complete and (wait := self._listener.wait_to_read(len(data))) > MIN_READ_PAUSE_S:
            self._pause_reading()
            self.loop.call_later(wait, self._resume_body)
        if self._is_complete:
            body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
            self._body = []
            self._start(body)

    def _take_chunks(self) -> None:
        while not self._is_complete:
            end = self._data.find(_END)
            # Without an end in sight, all but what may be the beginning of one.
            to = len(self._data) - len(_END) + 1 if end < 0 else end + len(_END)
            if to <= 0:
                break
            piece, self._data = self._data[:to], self._data[to:]
            before = self._size
            self._parser.feed_data(piece)
            size = self._size - before
            self._framing += to - size + MIN_CHUNK_BYTES
            if self._framing > MAX_FRAMING_BYTES + self._size:
                raise ValueError(f"more than {MAX_FRAMING_BYTES} bytes of chunk sizes and trailers")
            if self._size > self._listener.max_body_bytes:
                raise self._too_large()
            self._count_body(size)

    def _too_large(self) -> RequestError:
        limit = self._listener.max_body_bytes
        return RequestError(f"the body is larger than {limit} bytes, the most allowed", cause="too_large")

    def _count_body(self, size: int) -> None:
        """Count bytes of a body as in flight; raises RequestError."""
        if not size:
            return
        shares = self._listener.gate.bytes_in_flight
        try:
            shares.take(self.client, size)
        except RequestError as error:
            if error.cause == "over_share" or not self._listener.make_room(self.client):
                raise
            shares.take(self.client, size)
        self.body_bytes += size

    def refuse_body(self) -> None:
        """Refuse a request whose body is unfinished, to make room for others."""
        self._release()
        message = (
            "the server needs the memory of your unfinished body for other clients; send fewer at a time"
        )
        self._start(RequestError(message, cause="over_share", retry_after_s=1))

    def _release(self) -> None:
        if self.body_bytes:
            self._listener.gate.bytes_in_flight.give_back(self.client, self.body_bytes)
            self.body_bytes = 0
        self._body = []

    # Responding

    def _start(self, body: bytes | RequestError) -> None:
        """Start the application on a request, given its body or why that was not read."""
        self.state, self.deadline = RESPONSE, inf
        request = self._request = AsgiRequest(self, self._scope, body)
        task = self.loop.create_task(request.run(self._listener.app))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _refuse(self, status: int, message: str) -> None:
        """Refuse what is not HTTP, and close."""
        self._listener.gate.malformed()
        error = errors.plain_response(status, message)
        self.write(status, [*error.raw_headers, (b"connection", b"close")], bytes(error.body))
        self._linger()

    def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Write a head and the beginning of its body."""
        lines = [_STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status]
        for name, value in (*self._server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        lines += (b"\r\n", body)
        self._transport.write(b"".join(lines))

    def write_more(self, data: bytes) -> None:
        """Write more of a body."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the client reads what was written."""
        if self._resumed is not None:
            await self._resumed.wait()

    @property
    def is_gone(self) -> bool:
        """Whether the client closed the connection."""
        return self._gone

    @property
    def keeps_alive(self) -> bool:
        """Whether another request may follow."""
        return self._keep_alive and self._is_complete and not self._closing

    def responded(self) -> None:
        """The response is written: go on to the next request, or close."""
        self._server_state.total_requests += 1
        self.responses += 1
        self._request = None
        if self._gone or self._transport.is_closing():  # aborted meanwhile, as it did not read
            return
        if self.keeps_alive:
            self._release()
            self._wait(HEAD, KEEP_ALIVE_S)
            if self._data or self._reading_paused:
                self._awaits_turn, self.deadline = True, inf
                self.loop.call_later(self._listener.wait_for_pipelined(), self._take_turn)
        elif self._is_complete:
            self._release()
            self._close()
        else:
            self._linger()

    def broken(self) -> None:
        """The application failed in the middle of a response."""
        self._request = None
        self.abort()

    def _take_turn(self) -> None:
        """It is this connection's turn for a pipelined request."""
        self._awaits_turn = False
        if self.state == HEAD:
            self._wait(HEAD, HEAD_TIMEOUT_S)
            self._resume_parsing()

    def _resume_parsing(self) -> None:
        """Parse what was received meanwhile, unless the client must read first."""
        if self.state not in (HEAD, BODY) or self._resumed is not None or self._transport.is_closing():
            return
        self._resume_reading()
        self._advance()
