"""Fuzzer of the HTTP connection: streams of requests, split anywhere, at any pace.

Two connections receive the same stream: one receives it whole, the other in pieces, with late responses, late timers
and a client that stops reading. Both must hand the same requests to the application. Each request must equal the one
that h11, an independent parser, reads, unless h11 refuses it. At the end neither connection may hold any resources.
"""

import asyncio
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import h11
from hypothesis import strategies as st

from de3.runtime.errors import RequestError
from de3.runtime.shares import Shares
from de3.server.http.connection import MAX_PIPELINED_BYTES, Connection
from de3.server.http.listener import BODY, Listener
from de3.server.http.parser import MAX_HEAD_BYTES
from de3.server.settings import Settings
from lab.fuzzers.edits import spliced
from lab.fuzzers.run import Finding, Fuzzer

MAX_BODY_BYTES = 4000
MAX_STREAM = 40_000  # short enough that no limit depends on the number of pieces
NEEDS_NO_BODY, REFUSED = "/no-body", "/refused"  # paths answered without their body

METHODS = ("GET", "POST", "POST", "POST", "HEAD", "PUT", "OPTIONS", "CONNECT", "PRI", "get", "P OST")
PATHS = (
    *("/classify", "/", "*", "/a?b=c", "/a#b", "/%41%zz", "http://x/y?z", "http://x", "//x", "/\x80", "x:1"),
    *(NEEDS_NO_BODY, REFUSED, ""),
)
VERSIONS = (
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "HTTP/1.2",
    "HTTP/0.9",
    "http/1.1",
    "",
)
HEADERS = (
    *("Host: x", "Connection: close", "Connection: keep-alive", "Connection: upgrade", "Upgrade: h2c"),
    *(
        "Upgrade: websocket",
        "upgrade:",
        "X-Upgrade: a",
        "Expect: 100-continue",
        "Expect: x",
        "A: b",
        "A:",
        "A : b",
    ),
    *(" folded: x", "A: b\r\n c", "Content-Length: 0", "Content-Length: 5", "Content-Length: +5"),
    *(
        "Content-Length: 5, 5",
        "Content-Length: 0x5",
        "Content-Length: 99999999999999999999",
        "Content-Length:",
    ),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: identity", "Transfer-Encoding: chunked, identity"),
    *("Transfer-Encoding: gzip, chunked", "Transfer-Encoding:\x0bchunked", "Transfer_Encoding: chunked"),
    *("Trailer: A", "A: \x00", "A: \x7f", "A: é", ": a", "A", "A: b\n", "A: b\r", "Proxy-Connection: close"),
)
FRAGMENTS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\r\n\r\n",
        b" ",
        b"\t",
        b"\x00",
        b":",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b";a=b",
    ),
    *(b"GET / HTTP/1.1\r\n\r\n", b"\xff", b"ffffffffffffffff\r\n", b"-1\r\n", b"0", b"Content-Length: 5\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"upgrade: x\r\n", b"A: b\r\n", b"\x16\x03\x01"),
)


@st.composite
def _chunks(draw: st.DrawFn, body: bytes) -> bytes:
    """A chunked body, possibly with extensions, trailers or an error."""
    size = draw(st.sampled_from([1, 3, 100, 5000]))
    extension = draw(
        st.sampled_from([b"", b"", b";a", b";a=b", b";" + b"x" * 300, b" ", b"\t;", b';a="\r\n"'])
    )
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    trailers = draw(
        st.sampled_from([b"", b"", b"A: b\r\n", b"Content-Length: 5\r\n", b"A\r\n", b" x: y\r\n"])
    )
    form = draw(st.sampled_from([b"%x", b"%x", b"%X", b"0%x", b"%d"]))
    data = b"".join(form % len(piece) + extension + b"\r\n" + piece + b"\r\n" for piece in pieces)
    return (
        data + draw(st.sampled_from([b"0\r\n", b"0\r\n", b"000\r\n", b"0;a\r\n", b""])) + trailers + b"\r\n"
    )


@st.composite
def _request(draw: st.DrawFn) -> bytes:
    lines = [
        " ".join(
            (draw(st.sampled_from(METHODS)), draw(st.sampled_from(PATHS)), draw(st.sampled_from(VERSIONS)))
        )
    ]
    if draw(st.booleans()):
        lines = [f"POST {draw(st.sampled_from(PATHS))} HTTP/1.1"]
    headers = draw(st.lists(st.sampled_from(HEADERS), max_size=3))
    if draw(st.integers(0, 30)) == 0:
        headers *= draw(st.sampled_from([30, 60]))
    unit = draw(
        st.sampled_from([b"", b"x", b"hello", b"\r\n\r\n", b"0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00"])
    )
    body = unit * draw(st.sampled_from([1, 1, 2, 50, 1100]))
    match draw(st.sampled_from("nlc")):
        case "l":
            wrong = draw(st.sampled_from([0, 0, 0, 0, 1, -1, 100]))
            headers.insert(draw(st.integers(0, len(headers))), f"Content-Length: {max(0, len(body) + wrong)}")
        case "c":
            headers.insert(draw(st.integers(0, len(headers))), "Transfer-Encoding: chunked")
            body = draw(_chunks(body))
        case _:
            body = b""
    head = "\r\n".join([*lines, "Host: x", *headers, "", ""]).encode("latin-1")
    return head + body


@dataclass(frozen=True)
class Stream:
    """The bytes that a client sends, and the events between them.

    Attributes:
        cuts: lengths of the pieces; the remaining bytes are the last piece.
        acts: events after each piece, repeated from the start as needed, as bits: 1: the response is written, 2: timers
            run, 4: the client stops or starts reading.
        ends: end of the connection: "close" or "half-close" by the client, "expire" (a deadline passes), or "shutdown"
            of the server.
    """

    data: bytes
    cuts: list[int]
    acts: list[int]
    ends: str


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """A stream of up to five requests or fragments, some with errors, and the events during its arrival."""
    large = st.sampled_from([b"\r\n" * 100, b"A: " + b"a" * (MAX_HEAD_BYTES + 10), b"a" * 20_000])
    part = _request() | _request() | _request() | st.sampled_from(FRAGMENTS) | large
    data = b"".join(draw(st.lists(part, min_size=1, max_size=5)))
    data = draw(spliced(data, FRAGMENTS, draw(st.sampled_from([0, 0, 2]))))[:MAX_STREAM]
    cuts = draw(st.lists(st.integers(1, 300) | st.integers(1, MAX_STREAM), max_size=20))
    acts = draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    return Stream(data, cuts, acts, draw(st.sampled_from(["close", "expire", "half-close", "shutdown"])))


class _Task:
    """A finished task."""

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine

    def get_coro(self) -> Coroutine[Any, Any, None]:
        return self._coroutine

    def add_done_callback(self, _: Any) -> None: ...

    def cancel(self) -> None: ...


class _Loop:
    """An event loop whose timers run only when `run` is called."""

    def __init__(self) -> None:
        self.timers: list[tuple[Any, tuple[Any, ...]]] = []

    def call_later(self, _: float, callback: Any, *args: Any) -> None:
        if getattr(callback, "__func__", None) is not Listener._sweep:
            self.timers.append((callback, args))

    def call_soon(self, callback: Any, *args: Any) -> None:
        self.timers.append((callback, args))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Context in which asyncio regards this loop as the running one."""
        asyncio._set_running_loop(self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            asyncio._set_running_loop(None)

    def create_task(self, coroutine: Coroutine[Any, Any, None]) -> _Task:
        try:
            coroutine.send(None)
        except StopIteration:
            return _Task(coroutine)
        raise Finding("the handler waits")

    def run(self) -> None:
        timers, self.timers = self.timers, []
        for callback, args in timers:
            callback(*args)


class _Transport:
    """A transport whose client reads everything."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_reading, self._is_closing = True, False

    def get_extra_info(self, name: str) -> Any:
        if name != "socket":
            return ("127.0.0.1", 1)
        return SimpleNamespace(setsockopt=lambda *_: None, getsockopt=lambda *_: b"\x01")

    def set_write_buffer_limits(self, high: int) -> None: ...

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self._is_closing = True

    abort = close

    def is_closing(self) -> bool:
        return self._is_closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True


class _Frontend:
    """Admits every request except those for REFUSED; a request for NEEDS_NO_BODY is answered without its body."""

    def __init__(self) -> None:
        self.bytes_in_flight = Shares(10 * MAX_BODY_BYTES, "bytes")
        self.malformed_requests = 0
        self.service = SimpleNamespace(state="ready")

    def admit(self, scope: Any) -> str | None:
        if scope["path"] == REFUSED:
            raise RequestError("no", cause="no_key")
        return None if scope["path"] == NEEDS_NO_BODY else "client"

    def address(self, _: Any) -> str:
        return "127.0.0.1"

    def malformed(self) -> None:
        self.malformed_requests += 1

    def abandoned(self, _: object) -> None: ...

    def dropped(self, _: str) -> None: ...


class Client:
    """A connection without sockets or real time, and the requests that it handed to the application.

    Attributes:
        handled: scope and body of each request; the body may be the error that prevented reading it.
    """

    def __init__(self, answers_at_once: bool) -> None:
        self._answers_at_once, self.handled = answers_at_once, list[tuple[dict[str, Any], Any]]()
        self._pending, self._is_paused = 0, False
        self.frontend, self.loop, self.transport = _Frontend(), _Loop(), _Transport()
        settings = Settings(max_body_bytes=MAX_BODY_BYTES)
        self.listener = Listener(self.frontend, settings, 10)  # type: ignore[arg-type]
        state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
        self.connection = Connection(
            self.listener,
            self._handle,
            SimpleNamespace(root_path=""),
            state,
            {},
            self.loop,  # type: ignore[arg-type]
        )

    def open(self) -> None:
        """Connect the client."""
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]

    async def _handle(self, connection: Connection, scope: Any, body: bytes | RequestError) -> None:
        if self._pending:
            raise Finding("two requests at a time")
        self.handled.append((scope, body))
        self._pending = 1
        if self._answers_at_once:
            self.respond()

    def respond(self) -> None:
        """Respond to the current request, if there is one."""
        if self._pending:
            self._pending = 0
            self.connection.write(200, [(b"content-length", b"2")], b"ok")
            self.connection.responded()

    def toggle_reading(self) -> None:
        """Let the client stop reading responses, or start again; it cannot stop once the connection is closing."""
        if self._is_paused:
            self.connection.resume_writing()
        elif not self.transport.is_closing():
            self.connection.pause_writing()
        else:
            return
        self._is_paused = not self._is_paused

    def receive(self, data: bytes) -> None:
        """Respond and run timers until the connection reads, then give it data.

        Raises Finding if reading stays paused, or if too many bytes stay unparsed.
        """
        for _ in range(10):
            if self.transport.is_reading or self.transport.is_closing():
                break
            self._go_on()
        if not self.transport.is_closing():
            if not self.transport.is_reading:
                raise Finding("reading stays paused")
            self.connection.data_received(data)
            held = len(self.connection._parser.data)
            if held > MAX_PIPELINED_BYTES + MAX_HEAD_BYTES + len(data):
                raise Finding(f"{held} bytes are held unparsed")

    def _go_on(self) -> None:
        if self._is_paused:
            self.toggle_reading()
        self.respond()
        self.loop.run()

    def settle(self) -> None:
        """Respond and run timers until nothing is pending. Raises Finding if that takes more than 1,000 rounds."""
        for _ in range(1000):
            self._go_on()
            if not self._pending and not self.loop.timers:
                return
        raise Finding("it does not come to rest")

    def end(self, how: str) -> None:
        """End the connection. how: see `Stream.ends`.

        Raises Finding if the connection stays open after a half-close, or still holds resources at the end.
        """
        if how == "expire" and self.connection.state == BODY and not self.transport.is_closing():
            self.connection.expire(0.0)
            self.settle()
        if how == "half-close" and not self.transport.is_closing() and self.connection.eof_received():
            self.settle()
            if not self.transport.is_closing():
                raise Finding("a connection whose client ended its half stays open")
        if how == "shutdown":
            self.connection.shutdown()
            self.settle()
        self.transport.close()
        self.connection.connection_lost(None)
        self.loop.run()  # timers that fire after the connection is lost
        if self.frontend.bytes_in_flight.total or self.frontend.bytes_in_flight._held:
            raise Finding(f"{self.frontend.bytes_in_flight.total} bytes of a body are still counted")
        if self.listener.connections or self.listener._paused:
            raise Finding("the connection is still counted")


def _seen(client: Client) -> list[Any]:
    """The handled requests up to and including the first whose outcome depends on when its body arrived."""
    rows = list[Any]()
    for scope, body in client.handled:
        row = [scope[key] for key in ("method", "raw_path", "query_string", "http_version", "headers")]
        if scope["path"] in (REFUSED, NEEDS_NO_BODY):
            rows.append([*row, None])
            break
        rows.append([*row, body.cause if isinstance(body, RequestError) else body])
        if isinstance(body, RequestError):
            break
    return rows


def _first_by_h11(stream: bytes) -> tuple[h11.Request, bytes, bytes] | None:
    """The first request of a stream, its body, and the rest; None if h11 refuses it or waits for more."""
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=2 * MAX_HEAD_BYTES)
    parser.receive_data(stream)
    body, request = b"", None
    try:
        while not isinstance(event := parser.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                return None
    except h11.RemoteProtocolError:
        return None
    assert request is not None
    return request, body, parser.trailing_data[0]


def _compare_with_h11(stream: bytes, rows: list[Any], refused: int) -> int:
    """Raise Finding if h11 reads different requests; returns the number of requests that were compared.

    rows: requests from `_seen`. refused: number of requests that our connection refused as malformed.
    """
    # h11 also accepts a line feed alone as the end of a line; we then wait for the rest of the head.
    if not rows and not refused and b"\r\n\r\n" in stream and _first_by_h11(stream):
        raise Finding("h11 reads a request that is neither handled nor refused")
    for count, (method, path, query, version, headers, body) in enumerate(rows):
        read = _first_by_h11(stream)
        if read is None or not isinstance(body, bytes):
            return count
        request, their_body, stream = read
        theirs = [(bytes(k), bytes(v).strip()) for k, v in request.headers if k != b"upgrade"]
        ours = [(k, v.strip()) for k, v in headers]
        url = request.target.partition(b"#")[0].rstrip(b"?")
        same_url = not url.startswith(b"/") or url == (path + b"?" + query if query else path)
        seen = (method.encode(), version.encode(), ours, body)
        if seen != (request.method, request.http_version, theirs, their_body) or not same_url:
            raise Finding(f"h11 reads another request: {request}, {their_body!r}")
    return len(rows)


def _in_pieces(client: Client, stream: Stream) -> bool:
    """Give a stream to a connection in pieces; returns False if requests may be unanswered at the end."""
    at = number = 0
    for number, size in enumerate([*stream.cuts, len(stream.data)]):
        if at < len(stream.data):
            client.receive(stream.data[at : at + size])
            at += size
        act = stream.acts[number % len(stream.acts)]
        if act & 1:
            client.respond()
        if act & 2:
            client.loop.run()
        if act & 4:
            client.toggle_reading()
    settles = stream.ends == "expire" or bool(number % 2)
    if settles:
        client.settle()
    return settles


def check(stream: Stream) -> tuple[dict[str, float], str]:
    """Give a stream to two connections, and compare their requests with each other and with h11's."""
    whole, cut = Client(answers_at_once=True), Client(answers_at_once=False)
    with whole.loop.running():
        whole.open()
        whole.receive(stream.data)
        whole.settle()
        rows = _seen(whole)
        refused = whole.frontend.malformed_requests
        whole.end(stream.ends)
    with cut.loop.running():
        cut.open()
        is_settled = _in_pieces(cut, stream)
        others = _seen(cut)
        refused_too = cut.frontend.malformed_requests
        cut.end(stream.ends)
    if refused and len(others) > len(rows) and others[-1][-1] == "too_large":
        # This body is also malformed, and is refused for that if it arrives whole.
        others.pop()
        refused_too += 1
    if rows[: len(others)] != others or (is_settled and rows != others):
        raise Finding(f"the requests depend on how they arrive: {rows} and {others}")
    if is_settled and all(isinstance(row[-1], bytes) for row in rows) and refused != refused_too:
        raise Finding(f"the refusals depend on how the requests arrive: {refused} and {refused_too}")
    for status in re.findall(rb"HTTP/1\.1 (\d+)", bytes(whole.transport.written)):
        if status not in (b"100", b"200", b"400", b"405"):
            raise Finding(f"status {status.decode()}")
    compared = _compare_with_h11(stream.data, rows, refused)
    bodies = sum(len(row[-1]) for row in rows if isinstance(row[-1], bytes))
    scores = {"requests": float(len(rows)), "compared with h11": float(compared), "body bytes": float(bodies)}
    return scores, "requests" if rows else "refused" if refused else "incomplete"


FUZZER = Fuzzer(streams(), check)
