"""HTTP/1.1 for one client, with limits: the protocol that uvicorn creates for each connection.

It handles one request at a time: pipelined requests stay unparsed until the previous response is written and read. The
application starts when a request is complete or refused, so an unfinished body occupies only a connection and the
memory of the part received. Every part of a request is limited in bytes and in time. If a request cannot be read to its
end, the connection is closed after the response.
"""

import asyncio
import re
import socket
import struct
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from inspect import CORO_CREATED, getcoroutinestate
from math import inf
from time import monotonic, perf_counter
from typing import Any
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, parse_url
from starlette.types import Scope

from de3.runtime.errors import RequestError
from de3.runtime.networks import network_of
from de3.server.http import errors
from de3.server.http.listener import BODY, BODY_TIMEOUT_S, HEAD, LINGER, RESPONSE, BaseConnection, Listener
from de3.server.http.parser import RequestParser

MAX_PIPELINED_BYTES = 16 * 1024  # buffered during a response; more stays in the kernel's buffers
MAX_DISCARDED_BYTES = 2**24  # read after a refusal, so that a client that is still sending gets the response
SOCKET_BUFFER_BYTES = 2**16
WRITE_BUFFER_BYTES = 2**14  # a client with more unread bytes counts as not reading
MIN_READ_PAUSE_S = 0.001  # a shorter pause is not worth a timer
HEAD_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 30.0
LINGER_S = 2.0
PROBE_S = 0.05
HALF_CLOSED_S = 1.0
TCP_CLOSE = 7  # socket state, in Linux's tcp_states.h

_SIMPLE_PATH = re.compile(rb"/(?:[\w.:-][\w/.:-]*)?")  # without a query or escapes
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}


class Connection(BaseConnection, asyncio.Protocol):
    """A client's connection, which is `de3.connection` in the scope of its requests.

    If the connection is lost, the task of its request is cancelled.
    """

    def __init__(
        self,
        listener: Listener,
        handle: "Handler",
        config: Any,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """handle: answers a request; see Handler. The arguments after it are those that uvicorn passes."""
        super().__init__(_loop or asyncio.get_running_loop())
        self._listener, self._handle, self._root_path = listener, handle, config.root_path
        self._server_state, self._app_state = server_state, app_state
        self._transport: Any = None
        self._parser = RequestParser()
        self.deadline = self.opened_at + HEAD_TIMEOUT_S
        self._reading_paused = False
        self._awaits_turn = False  # waits for its turn to parse a pipelined request
        self._scope: Scope = {}
        self._resumed: asyncio.Event | None = None  # set when the client reads again
        self._task: asyncio.Task[None] | None = None  # task of the current request
        self._is_responding = False  # part of the response has been written
        self._is_probed = False
        self._closing = False  # close after the current response
        self._gone = False
        self._discarded = 0
        self._response_end: asyncio.Future[None] | None = None

    # Called by uvicorn and the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection, and wait for the first head."""
        self._transport = transport
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._peer = (str(peer[0]), int(peer[1])) if isinstance(peer, tuple) else None
        self._local = (str(local[0]), int(local[1])) if isinstance(local, tuple) else None
        self.address = self._listener.frontend.address(self._peer)
        self.network = network_of(self.address)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        # By default the kernel buffers up to megabytes for each connection.
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self._server_state.connections.add(self)
        self._listener.opened(self)

    def connection_lost(self, _: Exception | None) -> None:
        """Cancel the current request and release everything."""
        self._gone = True
        self._server_state.connections.discard(self)
        self._listener.closed(self)
        self._release()
        self.deadline = self.write_deadline = inf
        if self._task is not None:
            coroutine: Any = self._task.get_coro()
            if getcoroutinestate(coroutine) == CORO_CREATED:  # the task is cancelled before it begins
                self._listener.frontend.abandoned(self._scope)
            self._task.cancel()
        self._scope = {}  # the scope refers back to this connection
        if self._resumed is not None:
            self._resumed.set()
        self._end_response()

    def eof_received(self) -> bool:
        """Return True, to keep the connection, if a response is due: the client may have closed only its half."""
        if (self.state == RESPONSE or self._awaits_turn) and not self._closing:
            self.loop.call_later(PROBE_S, self._probe, monotonic() + HALF_CLOSED_S)
            return True
        return False

    def _probe(self, patience_ends: float) -> None:
        """Abort if a client that closed its half is gone or, with HTTP/1.0, has waited too long; else probe again.

        If the client has closed the whole connection, its system answers an interim response with a reset. HTTP/1.0
        has no interim responses, so an HTTP/1.0 client is aborted at `patience_ends` (monotonic seconds).
        """
        if self._gone or self._transport.is_closing():
            return
        if self._awaits_turn:  # a pipelined request, which has arrived
            self.loop.call_later(PROBE_S, self._probe, patience_ends)
        elif self.state != RESPONSE:
            self._close()  # nothing more can arrive
        elif self._is_closed() or (self._parser.version == "1.0" and monotonic() > patience_ends):
            self.abort()
        else:
            if not self._is_probed and not self._is_responding and self._parser.version == "1.1":
                self._is_probed = True
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.loop.call_later(PROBE_S, self._probe, patience_ends)

    def _is_closed(self) -> bool:
        """True if a reset has arrived; the transport no longer reads, so it does not notice one."""
        sock = self._transport.get_extra_info("socket")
        try:
            return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE)
        except OSError:  # not a TCP socket
            return False

    def shutdown(self) -> None:
        """Close now, or after the response to the current request."""
        if self.state in (BODY, RESPONSE):
            self._closing = True
        else:
            self._close()

    def pause_writing(self) -> None:
        """Start the timeout of a client that does not read."""
        self._resumed = asyncio.Event()
        self.write_deadline = monotonic() + WRITE_TIMEOUT_S
        self._listener.paused(self)

    def resume_writing(self) -> None:
        """Continue: the client reads again."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None
        if not self._transport.is_closing():
            self.write_deadline = inf
        self._listener.resumed(self)
        if not self._awaits_turn:
            self._resume_parsing()

    def data_received(self, data: bytes) -> None:
        """Parse the data, or buffer it until the current request is answered."""
        if self.state == LINGER:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES:
                self.abort()
            return
        parser = self._parser
        if self.state == HEAD and parser.is_idle:
            self._wait(HEAD, HEAD_TIMEOUT_S)
        parser.data = parser.data + data if parser.data else data
        if self.state == RESPONSE or self._resumed is not None or self._awaits_turn:
            if len(parser.data) > MAX_PIPELINED_BYTES:
                self._pause_reading()
        else:
            self._advance()

    # Deadlines

    def _wait(self, state: int, seconds: float) -> None:
        self.state, self.deadline = state, monotonic() + seconds

    def expire(self, now: float) -> None:
        """Close the connection or refuse its request, because a deadline has passed."""
        if self.write_deadline < now:
            self._listener.frontend.dropped("unread")
            self.abort()
        elif self.state == LINGER:
            self.abort()
        elif self.state == BODY:
            error = RequestError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", cause="slow_body")
            self._start(error)
        else:
            self._close()

    def _close(self) -> None:
        """Close once the written data have been sent; abort if that takes too long."""
        self.deadline = inf
        self.write_deadline = min(self.write_deadline, monotonic() + WRITE_TIMEOUT_S)
        self._transport.close()

    def abort(self) -> None:
        """Close at once; a client that has not read its response gets a reset."""
        self._listener.closed(self)
        if self.unread():  # otherwise the system would keep what is in its buffer until the client reads
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._transport.abort()

    def _linger(self) -> None:
        """Close after LINGER_S, so that a client that is still sending can read the response."""
        self._release()
        self._parser.data = b""
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

    # Reading

    def _advance(self) -> None:
        parser = self._parser
        try:
            if self.state == HEAD and parser.data and parser.parse_head():
                self._begin()
            if self.state == BODY and parser.data:
                self._read_body()
        except RequestError as error:  # raised by _read_body
            self._start(error)
        except HttpParserUpgrade:
            self._refuse(405, "CONNECT is not allowed; see /docs")
        except (HttpParserError, ValueError) as error:
            reason = str(error.__context__ or error)[:200]  # httptools wraps exceptions of callbacks
            self._refuse(400, f"not a well-formed HTTP/1.1 request: {reason}")

    def _begin(self) -> None:
        """Wait for the body, or start the handler if none is needed.

        Raises ValueError or HttpParserError for an invalid head.
        """
        parser = self._parser
        if parser.version not in ("1.0", "1.1"):
            raise ValueError(f"HTTP/{parser.version[:8]} is not supported")
        if parser.hosts != 1 and (parser.hosts or parser.version == "1.1"):  # RFC 9112, 3.2
            raise ValueError(f"it has {parser.hosts} Host headers; exactly one is required")
        if _SIMPLE_PATH.fullmatch(parser.url):
            raw_path, query = parser.url, b""
        else:
            url = parse_url(parser.url)
            raw_path, query = url.path or b"/", url.query or b""  # an absolute URL may have no path
        path = raw_path.decode("ascii")
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": parser.version,
            "server": self._local,
            "client": self._peer,
            "scheme": "http",
            "method": parser.method,
            "root_path": self._root_path,
            "path": self._root_path + (unquote(path) if "%" in path else path),
            "raw_path": self._root_path.encode("ascii") + raw_path,
            "query_string": query,
            "headers": parser.headers,
            "state": self._app_state.copy(),
            "de3.connection": self,
            "de3.host": parser.host,
            "de3.started": perf_counter(),
        }
        self._scope = scope
        if parser.is_complete:
            self._start(b"")
            return
        refusal: RequestError | None = None
        client = None
        try:
            client = self._listener.frontend.admit(scope)
        except RequestError as error:
            refusal = error
        if parser.length > self._listener.max_body_bytes:
            refusal = refusal or self._too_large()
        # A body that has already arrived is read in any case, so that the connection can be reused.
        if (client is None or refusal) and not 0 <= parser.length <= len(parser.data):
            self._start(refusal or b"")
            return
        self.client = client or ""
        self._wait(BODY, BODY_TIMEOUT_S)
        self._resume_reading()
        if parser.expects_continue and not parser.data:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self) -> None:
        """Parse the received part of a body.

        Raises RequestError if it is too large or would exceed the limit on bytes in flight, and ValueError or
        HttpParserError if it is malformed.
        """
        parser, received = self._parser, len(self._parser.data)
        size = parser.parse_body()
        if parser.size > self._listener.max_body_bytes:
            raise self._too_large()
        self._count_body(size)
        if parser.is_complete:
            self._start(parser.take_body())
        elif (wait := self._listener.wait_to_read(received)) > MIN_READ_PAUSE_S:
            self._pause_reading()
            self.loop.call_later(wait, self._resume_body)

    def _too_large(self) -> RequestError:
        limit = self._listener.max_body_bytes
        return RequestError(f"the body is larger than the limit of {limit} bytes", cause="too_large")

    def _count_body(self, size: int) -> None:
        """Count bytes of a body as in flight, if necessary in place of another client's unfinished body.

        Raises RequestError if they exceed the client's share or the limit.
        """
        if not size:
            return
        shares = self._listener.frontend.bytes_in_flight
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
        message = "the server needs the memory of your unfinished body for other clients; send less at a time"
        self._start(RequestError(message, cause="over_share", retry_after_s=1))

    def _release(self) -> None:
        if self.body_bytes:
            self._listener.frontend.bytes_in_flight.release(self.client, self.body_bytes)
            self.body_bytes = 0
        self._parser.release_body()

    # Responding

    def _start(self, body: bytes | RequestError) -> None:
        """Start the handler in its turn, given the body or the error that prevented reading it."""
        self.state, self.deadline = RESPONSE, inf
        self._listener.starts.add(self.network, partial(self._run, self._scope, body))

    def _run(self, scope: Scope, body: bytes | RequestError) -> None:
        if self._gone:
            self._listener.frontend.abandoned(scope)
            return
        self._task = self.loop.create_task(self._handle(self, scope, body))
        self._server_state.tasks.add(self._task)
        self._task.add_done_callback(self._server_state.tasks.discard)

    def _refuse(self, status: int, message: str) -> None:
        """Refuse CONNECT, or input that is not HTTP, and close."""
        self._listener.frontend.malformed()
        body = errors.body(status, message)
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        self._closing = True
        self.write(status, headers, body)
        self._linger()

    def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """Write the head of the response, and the beginning of its body."""
        if self._listener.frontend.service.state == "draining":
            self._closing = True
        lines = [_STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status]
        close = () if self.keeps_alive else ((b"connection", b"close"),)
        for name, value in (*self._server_state.default_headers, *headers, *close):
            lines += (name, b": ", value, b"\r\n")
        lines += (b"\r\n", body)
        self._is_responding = True
        self._transport.write(b"".join(lines))

    def write_more(self, data: bytes) -> None:
        """Write more of the response's body."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the client has caught up, if too many bytes are unread."""
        if self._resumed is not None:
            await self._resumed.wait()

    @property
    def is_gone(self) -> bool:
        """True if the connection is lost."""
        return self._gone

    @property
    def keeps_alive(self) -> bool:
        """True if another request may follow."""
        return self._parser.keep_alive and self._parser.is_complete and not self._closing

    async def response_ended(self) -> None:
        """Wait until the response is written, or the client is gone."""
        self._response_end = self.loop.create_future()
        await self._response_end

    def _end_response(self) -> None:
        if self._response_end is not None and not self._response_end.done():
            self._response_end.set_result(None)

    def responded(self) -> None:
        """Continue with the next request, or close; called when the response is written."""
        self._server_state.total_requests += 1
        self.answered_at = monotonic()
        self._task, self._is_responding = None, False
        self._end_response()
        if self._gone or self._transport.is_closing():  # aborted, because the client did not read
            return
        if self.keeps_alive:
            self._release()
            self._wait(HEAD, self._listener.keep_alive_s)
            if self._parser.data or self._reading_paused:
                self._awaits_turn, self.deadline = True, inf
                self.loop.call_later(self._listener.wait_for_pipelined(), self._take_turn)
        elif self._parser.is_complete:
            self._release()
            self._close()
        else:
            self._linger()

    def _take_turn(self) -> None:
        """Parse a pipelined request when its turn comes."""
        self._awaits_turn = False
        if self.state == HEAD:
            self._wait(HEAD, HEAD_TIMEOUT_S)
            self._resume_parsing()

    def _resume_parsing(self) -> None:
        """Parse the data received in the meantime, unless the client must read first."""
        if self.state not in (HEAD, BODY) or self._resumed is not None or self._transport.is_closing():
            return
        if len(self._parser.data) <= MAX_PIPELINED_BYTES:
            self._resume_reading()
        self._advance()
        if self.state == HEAD:  # the head is incomplete
            self._resume_reading()


# Answers a request, given its scope and its body, or the error that prevented reading it (asgi.py).
Handler = Callable[[Connection, Scope, bytes | RequestError], Coroutine[Any, Any, None]]
