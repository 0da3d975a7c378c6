"""Hostile clients, on real sockets: every part of a request has a limit in bytes and in time."""

import asyncio
import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from http.client import HTTPResponse
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from httptools import HttpParserError

from de3.runtime.background import errors
from de3.runtime.shares import Shares
from de3.server.http import connection, listener
from de3.server.http.fair import AT_ONCE
from de3.server.http.listener import BaseConnection, Listener
from de3.server.http.parser import (
    MAX_FRAMING_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MIN_CHUNK_BYTES,
    RequestParser,
)
from de3.server.settings import Settings
from tests.serving import Server, in_event_loop, serving, until

GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"
BODY = b'{"input": "good film"}'
POST = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
REQUEST = POST % (b"/classify", len(BODY)) + BODY
# Java's client asks for h2c in its first request; by itself, the parser would lose that request's body.
UPGRADES = [
    REQUEST.replace(b"localhost", b"localhost\r\nConnection: Upgrade, HTTP2-Settings\r\n" + wish)
    for wish in (b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk", b"upGRADE: websocket")
]
EXPECTING = REQUEST.replace(b"localhost", b"localhost\r\nExpect: 100-continue").removesuffix(BODY)
CHUNKED = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny"]) as running:
        yield running


@pytest.fixture(scope="module")
def small(store: Path) -> Iterator[Server]:
    """A server with low limits on bodies and connections."""
    limits = {"max_body_bytes": 8000, "max_inflight_bytes": 16_000, "max_connections": 12}
    with serving(store, models=["tiny"], **limits) as running:
        yield running


def connect(server: Server, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 20, source_address=(source, 0))


def answer(s: socket.socket, may_continue: bool = False) -> tuple[int, dict]:
    """Status and body of the next answer. Unlike http.client, this function reads nothing beyond that answer.

    may_continue: accept a 100 Continue before the answer; the server may send one to a client that has closed its
        sending half.
    """
    while b"\r\n\r\n" not in (seen := s.recv(2**16, socket.MSG_PEEK)):
        assert seen
    head = s.recv(seen.index(b"\r\n\r\n") + 4)
    if may_continue and head.startswith(b"HTTP/1.1 100 "):
        return answer(s)
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return int(head[9:12]), json.loads(s.recv(length, socket.MSG_WAITALL))


def ask(s: socket.socket, request: bytes = REQUEST) -> tuple[int, dict]:
    """Send a request and read its answer."""
    s.sendall(request)
    return answer(s)


def is_closed(s: socket.socket) -> bool:
    """True once the server has closed the connection; raises TimeoutError if it stays open."""
    try:
        while s.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def send(s: socket.socket, data: bytes) -> None:
    """Send data; no error if the server closes the connection before all of it is sent."""
    with suppress(BrokenPipeError, ConnectionResetError):
        s.sendall(data)


def works(server: Server) -> None:
    assert server.classify(input="good").status_code == 200
    # The bytes and the text are released only after the answer is written, so the client may get here earlier.
    until(lambda: server.frontend.bytes_in_flight.total == 0, "the body's bytes to be given back")
    until(lambda: server.service.admission.texts.total == 0, "the text to be given back")


@contextmanager
def counted(server: Server, cause: str, times: int = 1) -> Iterator[None]:
    """In the end, the server has refused this many more requests for this cause."""
    rejected = partial(server.metric, "de3_rejected_total", cause=cause)
    before = rejected()
    yield
    until(lambda: rejected() >= before + times, f"{times} of the cause {cause}")
    assert rejected() == before + times


@pytest.fixture
def quiet(server: Server) -> Server:
    """The server, once the connections of earlier tests have ended."""
    until(lambda: not server.listener.connections, "the connections to end")
    return server


@pytest.fixture
def starts(quiet: Server, monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """The requests that a slow server has not started yet, which the test starts."""
    starts: list[Callable[[], None]] = []
    monkeypatch.setattr(quiet.listener.starts, "add", lambda _, start: starts.append(start))
    return starts


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"POST /classify HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES, "head is larger than 32768 bytes"),
        (b"GET / HTTP/1.1\r\n" + b"a:\r\n" * (MAX_HEADERS + 1) + b"\r\n", "more than 100 headers"),
        (b"\r\n" * MAX_HEAD_BYTES, "head is larger"),
        (b"\x16\x03\x01", "does not begin with a method"),
        (CHUNKED + b"1\r\na\r\n" * 2000, "small chunks"),
        (CHUNKED + b"1;" + b"x" * 2 * MAX_FRAMING_BYTES, "chunk sizes and trailers"),
        (b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
        (b"GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n", "CRLF"),
        (b"GET / HTTP/1.1\r\n\r\n", "has 0 Host headers"),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n\r\n", "has 2 Host headers"),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "HTTP/2.0 is not supported"),
    ],
    ids=range(11),
)
def test_malformed_http_gets_a_json_400_and_is_closed(server: Server, data: bytes, says: str) -> None:
    with counted(server, "malformed"), connect(server) as s:
        send(s, data)
        status, body = answer(s)
        assert (status, body["error"]["code"]) == (400, 400) and says in body["error"]["message"], body
        assert is_closed(s)
    works(server)


@pytest.mark.parametrize(
    ("data", "status", "closes"),
    [
        (b"CONNECT x:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", 405, True),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0\r\nConnection: keep-alive"), 200, True),
        (b"GET /health HTTP/1.0\r\n\r\n", 200, True),  # it needs no Host
        (GET % (b"/health", b"Connection: close\r\n") + REQUEST, 200, True),
        (GET % (b"http://example.com/health", b""), 200, False),
        (GET.replace(b"GET", b"PUT") % (b"http://example.com", b""), 405, False),
        # A body that came with its head is read whether it is needed or not, without a 100 Continue.
        (GET % (b"/health", b"Content-Length: 4\r\n") + b"GET ", 200, False),
        (EXPECTING + BODY, 200, False),
        (UPGRADES[0], 200, False),
        (UPGRADES[1], 200, False),
        (b"\r\n" + REQUEST, 200, False),
    ],
    ids=range(11),
)
def test_the_connection_stays_open_unless_a_request_ends_it(
    server: Server, data: bytes, status: int, closes: bool
) -> None:
    with connect(server) as s:
        assert ask(s, data)[0] == status
        if closes:
            assert is_closed(s)
        else:
            assert ask(s)[0] == 200


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (POST % (b"/nope", 1000000000), 404),
        (POST % (b"/classify", 1000000000), 413),
        (CHUNKED + b"2000\r\n" + b"a" * 8100, 413),
        (GET % (b"/health", b"Content-Length: 1000\r\n"), 200),
    ],
    ids=range(4),
)
def test_an_answer_before_the_end_of_the_body_ends_the_connection(
    small: Server, monkeypatch: pytest.MonkeyPatch, data: bytes, status: int
) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.1)
    with connect(small) as s:
        s.sendall(data)
        response = HTTPResponse(s, method="POST")
        response.begin()
        response.read()
        assert (response.status, response.getheader("connection")) == (status, "close")
        send(s, b"x")
        assert is_closed(s)
        until(lambda: not small.listener.connections, "the end")
    works(small)


@pytest.mark.parametrize(
    ("limit", "data", "then", "status"),
    [
        ("HEAD_TIMEOUT_S", b"", b"", None),
        ("HEAD_TIMEOUT_S", REQUEST[:20], b"", None),
        ("HEAD_TIMEOUT_S", b"\r\n", b"\r\n", None),  # empty lines keep no connection open
        ("BODY_TIMEOUT_S", CHUNKED + b"16\r\n" + BODY + b"\r\n0\r\nX: a", b"", 408),  # an unfinished trailer
    ],
    ids=range(4),
)
def test_what_does_not_arrive_in_time_ends_the_connection(
    server: Server, monkeypatch: pytest.MonkeyPatch, limit: str, data: bytes, then: bytes, status: int | None
) -> None:
    """then: what the client goes on sending."""
    monkeypatch.setattr(connection, limit, 0.3)
    with counted(server, "slow_body", status == 408), connect(server) as s:
        s.sendall(data)
        if status:
            found, body = answer(s)
            assert found == status and "did not arrive within 0.3 s" in body["error"]["message"]
        s.settimeout(0.01 if then else 20)

        def is_cut() -> bool:
            send(s, then)
            with suppress(TimeoutError):
                return is_closed(s)
            return False

        until(is_cut, "the end")


@pytest.mark.parametrize("reads", [True, False])
def test_pipelined_requests_are_read_no_faster_than_their_client_reads_answers(
    quiet: Server, reads: bool
) -> None:
    requests = unsent = memoryview(GET % (b"/nope", b"") * 10_000)
    received, most = 0, 0
    with counted(quiet, "client_gone", 0), connect(quiet) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        until(lambda: quiet.listener.connections, "the connection")
        (one,) = quiet.listener.connections
        s.setblocking(False)
        while received < 50_000 if reads else one.write_deadline == inf:  # some hundreds of responses
            with suppress(BlockingIOError):
                unsent = unsent[s.send(unsent) :] or requests
            with suppress(BlockingIOError):
                received += len(s.recv(2**16)) if reads else 0
            most = max(most, len(one._parser.data))  # type: ignore[attr-defined]
        assert 0 < most < 2**19 and one.unread() < 2**18
        works(quiet)
        s.close()
        until(lambda: not quiet.listener.connections, "the connection to be forgotten")
    assert not quiet.listener._paused


def test_a_body_sent_after_100_continue(server: Server) -> None:
    with connect(server) as s:
        s.sendall(EXPECTING)
        assert s.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert ask(s, BODY)[0] == 200
        # Without a 100 Continue before it:
        assert ask(s, EXPECTING.replace(b"22\r\n", b"2000000000\r\n"))[0] == 413
    with connect(server) as s:
        s.sendall(EXPECTING.replace(b"HTTP/1.1", b"HTTP/1.0"))
        until(lambda: server.bodies_awaited() == 1, "the head to come")
        assert ask(s, BODY)[0] == 200  # HTTP/1.0 has no interim responses


def test_unfinished_bodies_make_room_for_clients_within_their_share(small: Server) -> None:
    head, shares = POST % (b"/classify", 8000), small.frontend.bytes_in_flight
    with ExitStack() as stack:
        holders = []
        sizes = [(2, 7999), (2, 7999), (3, 1000), (4, 500), (5, 250), (6, 125), (7, 62), (8, 32)]
        for address, size in sizes:
            s = stack.enter_context(connect(small, f"127.0.0.{address}"))
            before = shares.total
            s.sendall(head + b"x" * size)
            until(lambda n=before + size: shares.total == n, "the body")
            holders.append(s)
        mine = stack.enter_context(connect(small))
        mine.sendall(head + b"x" * 200)  # more than what is left
        (given_up, *_), _, _ = select.select(holders[:2], [], [], 20)
        status, body = answer(given_up)
        assert status == 429 and "unfinished body" in body["error"]["message"]
        assert small.bodies_awaited() == 8 and small.service.in_flight == 0  # they occupy no slots


def test_each_packet_of_a_chunk_extension_counts_as_a_small_chunk() -> None:
    parser, packets = RequestParser(), 0
    parser.data = CHUNKED + b"1;"
    assert parser.parse_head()
    with pytest.raises(ValueError, match="chunk sizes and trailers"):
        while packets < 10_000:
            packets += 1
            parser.data += b"x"
            parser.parse_body()
    assert packets == pytest.approx(MAX_FRAMING_BYTES / (MIN_CHUNK_BYTES + 1), abs=5)


def test_a_request_is_parsed_however_it_is_cut_and_the_next_one_is_left() -> None:
    head, chunks = CHUNKED, b"6\r\nh\r\n\r\ni\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
    for cut in range(len(chunks)):
        parser = RequestParser()
        for at in range(len(head)):
            assert parser.data == head[:at]
            parser.data += head[at : at + 1]
            assert parser.parse_head() == (at == len(head) - 1)
        parser.data = chunks[:cut]
        parser.parse_body()
        parser.data += chunks[cut:] + b"GET /next"
        parser.parse_body()
        assert parser.is_complete and (parser.take_body(), parser.data) == (b"h\r\n\r\ni", b"GET /next")
        assert dict(parser.headers).keys() == {b"host", b"transfer-encoding"}  # a trailer is not a header


@pytest.mark.parametrize(
    ("count", "size", "is_accepted"), [(1040, 1, True), (1041, 1, False), (9000, 64, True)]
)
def test_small_chunks_are_limited_by_their_mean_size(count: int, size: int, is_accepted: bool) -> None:
    parser = RequestParser()
    parser.data = CHUNKED + b"%x\r\n%s\r\n" % (size, b"a" * size) * count + b"0\r\n\r\n"
    assert parser.parse_head()
    with nullcontext() if is_accepted else pytest.raises(HttpParserError):
        parser.parse_body()
    assert (parser.is_complete and parser.take_body() == b"a" * size * count) == is_accepted


def test_a_body_that_comes_after_a_shutdown_began_is_read(server: Server) -> None:
    with connect(server) as s:
        s.sendall(REQUEST[:-3])
        until(lambda: server.bodies_awaited() == 1, "the head to come")
        (waiting,) = [c for c in server.listener.connections if c.state == connection.BODY]
        waiting.loop.call_soon_threadsafe(waiting.shutdown)  # type: ignore[attr-defined]
        assert ask(s, REQUEST[-3:])[0] == 200 and is_closed(s)


def test_a_client_that_goes_on_sending_after_a_refusal_is_cut_off(server: Server) -> None:
    sent = 0
    with connect(server) as s:
        assert ask(s, b"?")[0] == 400
        with suppress(BrokenPipeError, ConnectionResetError):
            while sent < 2**26:
                sent += s.send(b"x" * 2**16)
    assert connection.MAX_DISCARDED_BYTES < sent < 2**25  # the buffers hold less than the rest


class Made(BaseConnection):
    """A stand-in for a connection that has been opened, for tests of the listener."""

    def __init__(
        self,
        shared: Listener,
        network: str = "",
        idle_s: float = 0.0,
        answered: bool = False,
        is_unread: bool = False,
        **fields: Any,
    ) -> None:
        """fields: further attributes."""
        super().__init__(mock.Mock())
        self.shared, self.network, self.has_been_read = shared, network, not is_unread
        self.opened_at = time.monotonic() - idle_s
        self.answered_at = self.opened_at if answered else None
        self.is_aborted, self.is_refused, self.left = False, False, 0
        vars(self).update(fields)
        shared.opened(self)

    def expire(self, now: float) -> None: ...

    def abort(self) -> None:
        self.is_aborted = True
        self.shared.closed(self)

    def unread(self) -> int:
        return self.left

    def refuse_body(self) -> None:
        self.is_refused = True


def made_listener(limit: int = 5) -> Listener:
    frontend: Any = SimpleNamespace(bytes_in_flight=Shares(1000, "bytes"), dropped=lambda _: None)
    return Listener(frontend, Settings(), limit)


# Connections in the order of eviction; of each: its network, seconds idle, has been answered, has not been read yet.
LOSSES: list[Any] = [
    ("large", 1.0, False),  # silent: older than FRESH_S, without a response
    ("other", 9.0, True),  # idle for more than IDLE_S
    ("other", 6.0, True),
    ("other", 3.0, False),
    ("other", 2.0, False),
    ("large", 0.1, False),  # its network has the most connections
    ("large", 4.0, True),
    ("large", 0.2, True),
    ("other", 0.2, False),
    ("other", 4.0, True),
    ("other", 0.1, False, True),  # not read yet
    ("other", 0.1, True),
]


@pytest.mark.parametrize("first", range(len(LOSSES)))
def test_the_smallest_loss_is_evicted(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    for where in ("time.monotonic", "de3.server.http.listener.monotonic"):
        monkeypatch.setattr(where, lambda: now)  # they grow no older while they are made
    shared = made_listener(1000)
    large = [Made(shared, "large", state=connection.RESPONSE) for _ in range(10)]
    left = [Made(shared, *loss) for loss in reversed(LOSSES[first:])]
    shared.max_connections = len(shared.connections) + 1
    new = Made(shared, "new")
    assert [one.is_aborted for one in left] == [False] * (len(left) - 1) + [True]
    assert not new.is_aborted and not any(one.is_aborted for one in large)


def test_a_network_has_no_more_than_its_share_of_the_connections() -> None:
    shared = made_listener(90)
    many = [Made(shared, "a", idle_s=n, address=str(n)) for n in range(89)]
    assert len(shared.connections) == 80 == sum(not one.is_aborted for one in many)


def test_an_address_leaves_room_for_others_of_its_network() -> None:
    shared = made_listener(100)
    for _ in range(99):
        Made(shared, "a", state=connection.RESPONSE, address="a.1")
    assert len(shared.connections) == 80
    other = Made(shared, "a", address="a.2", is_unread=True)
    for _ in range(50):  # without those that await a response, only new ones can be evicted
        Made(shared, "a", address="a.1")
    assert not other.is_aborted and len(shared.connections) == 81


def test_idle_clients_keep_no_new_one_out(small: Server) -> None:
    dropped = partial(small.metric, "de3_dropped_connections_total", reason="connection_limit")
    until(lambda: not small.listener.connections, "the connections to end")
    before = dropped()
    with ExitStack() as stack:
        clients = []
        for number in range(16):
            clients.append(stack.enter_context(connect(small, f"127.{number}.0.1")))
            assert ask(clients[-1])[0] == 200
        until(lambda: {c.state for c in small.listener.connections} == {connection.HEAD}, "the next requests")
        ends = [c.deadline - time.monotonic() for c in small.listener.connections]
        assert all(60 < end <= 75 for end in ends)  # most load balancers keep idle connections for 60 s
        assert all(map(is_closed, clients[:5]))  # the least recently used
        for one in clients[5:]:
            assert ask(one)[0] == 200
    assert dropped() == before + 5


def test_a_client_that_closes_its_half_gets_the_answers_to_pipelined_requests(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second request waits for its turn for so long that the connection is probed meanwhile.
    monkeypatch.setattr(server.listener, "wait_for_pipelined", lambda: 3 * connection.PROBE_S)
    with connect(server) as s:
        assert ask(s, 2 * REQUEST)[0] == 200
        s.shutdown(socket.SHUT_WR)
        assert answer(s, may_continue=True)[0] == 200 and is_closed(s)


def test_a_half_closed_client_of_a_slow_server_is_probed(
    quiet: Server, starts: list[Callable[[], None]]
) -> None:
    for version in (b"1.1", b"1.0"):
        with connect(quiet) as s:
            s.sendall(REQUEST.replace(b"1.1", version))
            s.shutdown(socket.SHUT_WR)
            if version == b"1.1":
                assert s.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            until(lambda: starts, "the request")
            loop = next(iter(quiet.listener.connections)).loop
            loop.call_soon_threadsafe(starts.pop())
            assert answer(s)[0] == 200 and is_closed(s)
        until(lambda: not quiet.listener.connections, "the connection to be forgotten")
    with connect(quiet) as s:
        s.sendall(REQUEST[:-1])
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1) == b""  # an incomplete request gets no answer


def test_a_request_whose_client_leaves_before_its_turn_is_counted(
    quiet: Server, starts: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client closes the connection, or resets it, as it does if it has unread data."""
    monkeypatch.setattr(connection, "HALF_CLOSED_S", 0.2)
    gone = partial(quiet.metric, "de3_requests_total", status="499")
    before = gone()
    for request, resets in (
        (REQUEST, True),
        (REQUEST, False),
        (REQUEST.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (GET % (b"/nope", b""), True),
    ):
        with counted(quiet, "client_gone"):
            with connect(quiet) as s:
                s.sendall(request)
                until(lambda: starts, "the request")
                loop = next(iter(quiet.listener.connections)).loop
                if resets:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            until(lambda: not quiet.listener.connections, "the connection to be forgotten")
            loop.call_soon_threadsafe(starts.pop())
    assert gone() == before + 3
    with connect(quiet) as s:  # the client leaves once its turn has come, before the request begins
        s.sendall(REQUEST)
        until(lambda: starts, "the request")
        lost = next(iter(quiet.listener.connections))
        loop.call_soon_threadsafe(lambda: (starts.pop()(), lost.connection_lost(None)))
        until(lambda: gone() == before + 4, "the count")


def test_the_largest_body_of_the_client_with_the_most_bytes_makes_room() -> None:
    shared, connections = made_listener(100), []
    for client, size in (("x", 10), ("x", 20), ("y", 25)):
        connections.append(Made(shared, state=connection.BODY, client=client, body_bytes=size))
        shared.frontend.bytes_in_flight.take(client, size)
    assert shared.make_room("new")
    assert [one.is_refused for one in connections] == [False, True, False]


def test_the_client_that_has_read_least_is_cut_off_first() -> None:
    shared, dropped = made_listener(100), list[str]()
    shared.frontend.dropped = dropped.append  # type: ignore[method-assign]
    connections = [Made(shared, left=share * listener.MAX_UNREAD_BYTES // 7) for share in (2, 4, 5)]
    for one in connections:
        shared.paused(one)
    assert [one.is_aborted for one in connections] == [False, False, True]
    assert dropped == ["unread"]


def test_all_connections_share_the_rate_at_which_bodies_are_read() -> None:
    shared, began = made_listener(), time.monotonic()
    waits = [shared.wait_to_read(int(listener.MAX_BODY_BYTES_PER_S)) for _ in range(3)]
    assert waits[0] == pytest.approx(1) and time.monotonic() + waits[2] >= began + 3


@in_event_loop
async def test_an_error_ends_neither_the_other_connections_nor_the_requests_that_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, shared, before = 100.0, made_listener(100), errors.copy()
    monkeypatch.setattr(listener, "monotonic", lambda: now)
    expire = mock.Mock(side_effect=[RuntimeError("unexpected"), None] * 2)
    first, *_ = [Made(shared, expire=expire, deadline=100.1) for _ in range(4)]
    _, sweep, loop = first.loop.call_later.call_args.args  # type: ignore[attr-defined]
    now = 200.0  # the process was stalled: what has arrived meanwhile is read first
    sweep(loop)
    assert not expire.called
    now = 200.2
    sweep(loop)
    start = mock.Mock(side_effect=[None] * AT_ONCE + [RuntimeError("unexpected"), None] * AT_ONCE)
    for _ in range(3 * AT_ONCE):
        shared.starts.add("a network", start)
    while start.call_count < 3 * AT_ONCE:
        await asyncio.sleep(0)
    assert expire.call_count == 4
    assert errors - before == {"connection_deadlines": 2, "request_start": AT_ONCE}
