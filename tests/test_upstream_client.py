"""A call of an upstream that misbehaves, on a real socket: each failure has its kind, and shows no secret."""

import asyncio
import gzip
import json
import socket
import subprocess
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from time import sleep, thread_time, time
from typing import Any

import pytest

from de3.server.engine.request import Text
from de3.server.upstream.client import (
    MAX_RESPONSE_BYTES,
    MAX_RETRY_AFTER_S,
    MAX_TOKENS,
    CallError,
    Client,
    Reply,
    Usage,
)
from tests.serving import free_port, until
from tests.upstream import KEY, Service, chat, model_of, reply, send, service

LABELS = ["billing", "refund", "card lost", "other"]
SECRET = "a-secret-in-the-url"
Respond = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@pytest.fixture
def upstream() -> Iterator[Service]:
    with service(lambda _: "billing") as running:
        yield running


def call(
    folder: Path,
    url: str,
    text: Text | str = "a text",
    timeout_s: float = 30,
    used: list[Usage] | None = None,
    **fields: Any,
) -> tuple[Reply, Usage]:
    """The answer of one call, and its tokens, which are also added to `used`."""
    if isinstance(text, str):
        text = Text(text)
    used = [] if used is None else used

    async def one() -> Reply:
        client = Client(model_of(folder, LABELS, chat(f"{url}?key={SECRET}", **fields)), KEY)
        try:
            return await client.call(text, timeout_s, used.append)
        finally:
            await client.close()

    found = asyncio.run(one())
    assert len(used) == 1
    return found, used[0]


def failure(folder: Path, url: str, **more: Any) -> CallError:
    """The error of one call, which shows neither the key nor the URL."""
    return failure_and_usage(folder, url, **more)[0]


def failure_and_usage(folder: Path, url: str, **more: Any) -> tuple[CallError, list[Usage]]:
    """The error of one call, and the tokens that were counted."""
    used = list[Usage]()
    with pytest.raises(CallError) as found:
        call(folder, url, used=used, **more)
    for shown in (str(found.value), repr(found.value)):
        assert KEY not in shown
        assert SECRET not in shown
        assert "a text" not in shown
    assert found.value.__cause__ is None
    return found.value, used


def test_a_chat_is_asked_with_the_prompt_the_key_and_the_parameters(
    tmp_path: Path, upstream: Service
) -> None:
    fields = {
        "parameters": {"temperature": 0, "max_tokens": 8, "stop": ["\n"]},
        "prompt": "{labels}: {text} {x}",
    }
    text = "a {text} with {labels}, {0}, % and \\1 ünïcode"
    found, used = call(tmp_path, upstream.url, text, **fields)
    assert found == Reply(0, None, False)
    assert used == Usage(100, 10)
    (body,), (headers,) = upstream.requests, upstream.headers
    content = f"billing, refund, card lost, other: {text} {{x}}"
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        "stop": ["\n"],
    }
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Accept-Encoding"] == "identity"


def test_pairs_fill_in_two_placeholders(tmp_path: Path, upstream: Service) -> None:
    call(tmp_path, upstream.url, Text("{text_pair}", "{text}"), prompt="1 {text} 2 {text_pair}")
    assert upstream.requests[0]["messages"][0]["content"] == "1 {text_pair} 2 {text}"


def test_classify_gives_probabilities_that_agree_with_the_label(tmp_path: Path, upstream: Service) -> None:
    fields: dict[str, Any] = {
        "kind": "classify",
        "model": None,
        "prompt": None,
        "parameters": {"priority": 1},
    }
    row: dict[str, Any] = {"label": "Refund", "probs": [0.1, 0.7, 0.1, 0.1]}
    upstream.respond = lambda handler, _: send(handler, {"data": [row]})
    found, used = call(tmp_path, upstream.url, Text("one", "two"), **fields)
    assert found == Reply(1, [0.1, 0.7, 0.1, 0.1], False)
    assert upstream.requests[0] == {"input": {"text": "one", "text_pair": "two"}, "priority": 1}
    assert used.input > 0
    assert used.output > 0
    for probs in (
        None,
        [0.7, 0.1, 0.1, 0.1],
        [0.4, 0.4, 0.1, 0.1],
        [0.1, 0.7],
        [0.1, 0.9, 0.5, 0.1],
        [0, True, 0, 0],
        ["0", "1", "0", "0"],
        [-0.1, 1, 0.1, 0],
        {"refund": 1},
    ):
        row["probs"] = probs
        assert call(tmp_path, upstream.url, **fields)[0] == Reply(1, None, False)
    row["label"] = "It is refund"  # a classifier's label has no words around it
    assert failure(tmp_path, upstream.url, **fields).why == "reply"


def raw(content: bytes, drip_s: float = 0.0, times: int = 1) -> Respond:
    """A response of these bytes, sent several times, with a pause after each; then the connection closes."""

    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.close_connection = True
        for _i in range(times):
            handler.wfile.write(content)
            handler.wfile.flush()
            sleep(drip_s)

    return respond


def answer(body: Any, status: int = 200, **headers: str) -> Respond:
    return lambda handler, _: send(handler, body, status, **headers)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BAD_BODIES: list[Any] = [
    b"",
    b"{",
    b"<html>",
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    [],
    {},
    {"choices": None},
    {"choices": []},
    {"choices": [None]},
    {"choices": [{"message": "billing"}]},
    {"choices": [{"message": {"content": 3}}]},
    {"choices": [{"message": {"content": [{"type": "text", "text": "billing"}]}}]},
    {"choices": {"0": {"message": {"content": "billing"}}}},
    {"error": {"message": KEY}},
]


@pytest.mark.parametrize(
    ("respond", "why", "may_retry", "is_outage"),
    [
        *((answer(body), "invalid", False, True) for body in BAD_BODIES),
        (answer(gzip.compress(b"{}"), Content_Encoding="gzip"), "invalid", False, True),
        (answer(reply("")), "reply", True, False),
        (answer(reply("I cannot tell.")), "reply", True, False),
        (answer(reply("billing or refund")), "reply", True, False),
        (answer(reply("billing " * 20_000)), "reply", True, False),
        (answer(reply(None, refusal="I cannot help with that.")), "reply", True, False),
        (answer(reply(None)), "reply", True, False),  # a content filter
        (answer({"choices": [{"message": {"role": "assistant"}}]}), "reply", True, False),
        (answer({}, 400), "refused", False, False),
        (answer({}, 413), "refused", False, False),
        (answer({}, 422), "refused", False, False),
        (answer({"error": KEY}, 401), "refused", False, True),
        (answer({}, 404), "refused", False, True),
        (answer({}, 201), "refused", False, True),
        (answer({}, 429), "rate_limited", True, True),
        (answer({}, 500), "server_error", True, True),
        (answer({}, 503), "server_error", True, True),
        (raw(b""), "connection", True, True),
        (raw(b"SSH-2.0-OpenSSH_9\r\n"), "connection", True, True),
        (raw(HEAD + b"Content-Length: 500\r\n\r\n{"), "connection", True, True),
        (raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"), "connection", True, True),
        (raw(HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n{}"), "connection", True, True),
    ],
)
def test_a_response_that_is_no_answer(
    tmp_path: Path, upstream: Service, respond: Respond, why: str, may_retry: bool, is_outage: bool
) -> None:
    upstream.respond = respond
    found = failure(tmp_path, upstream.url)
    assert (found.why, found.may_retry, found.is_outage) == (why, may_retry, is_outage)
    assert found.retry_after_s is None
    assert found.is_certain == ("HTTP 401" in str(found))  # no text can cause it
    if why == "reply":
        assert (
            str(found) == "its reply names no label, or several"
        )  # it is not quoted: it may have the prompt


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("1.5", 1.5),
        ("99999999", MAX_RETRY_AFTER_S),
        ("1e999", None),
        ("-3", None),
        ("soon", None),
        ("", None),
        ("Fri, 99 Foo 9999 99:99:99 GMT", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after(
    tmp_path: Path, upstream: Service, status: int, value: str, seconds: float | None
) -> None:
    upstream.respond = answer({}, status, Retry_After=value)
    assert failure(tmp_path, upstream.url).retry_after_s == seconds


def test_retry_after_may_be_a_date(tmp_path: Path, upstream: Service) -> None:
    upstream.respond = answer({}, 429, Retry_After=formatdate(time() + 100, usegmt=True))
    found = failure(tmp_path, upstream.url).retry_after_s
    assert found is not None
    assert 60 < found <= 100


def test_an_answer_is_read_whatever_is_around_it(tmp_path: Path, upstream: Service) -> None:
    """Neither the content type nor fields that are not used matter; a response without usage has an estimate."""
    for usage in (
        None,
        {},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": 2**60},
        {"prompt_tokens": MAX_TOKENS + 1, "completion_tokens": MAX_TOKENS + 1},
        "much",
    ):
        upstream.respond = answer({**reply("Refund!"), "usage": usage, "x": [1]}, Content_Type="text/html")
        found, used = call(tmp_path, upstream.url)
        assert found == Reply(1, None, False)
        assert 0 < used.input < 100
        assert 0 < used.output < 100
    upstream.respond = answer(reply("The label is 'card-lost'."))
    assert call(tmp_path, upstream.url)[0] == Reply(2, None, True)
    assert failure(tmp_path, upstream.url, reply="exact").why == "reply"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path: Path, upstream: Service, status: int) -> None:
    with service() as other:
        upstream.respond = answer({}, status, Location=f"{other.url}?key={SECRET}")
        found = failure(tmp_path, upstream.url)
        assert (found.why, found.may_retry, found.is_outage) == ("redirect", False, True)
        assert "redirect, which is not followed" in str(found)
        assert other.requests == []


@pytest.mark.parametrize("has_length", [True, False])
def test_a_huge_response_is_cut(tmp_path: Path, upstream: Service, has_length: bool) -> None:
    size, sent = 100 * 2**20, []

    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(HEAD + (b"Content-Length: %d\r\n" % size if has_length else b"") + b"\r\n")
        for _i in range(size // 2**16):
            handler.wfile.write(b"x" * 2**16)
            sent.append(2**16)

    upstream.respond = respond
    tracemalloc.start()
    try:
        found = failure(tmp_path, upstream.url)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    assert (found.why, found.may_retry) == ("invalid", False)
    assert str(found) == f"the response has more than {MAX_RESPONSE_BYTES} bytes"
    assert sum(sent) < size  # the connection was closed


def test_the_largest_response_takes_a_few_milliseconds(tmp_path: Path) -> None:
    client = Client(model_of(tmp_path, LABELS, chat()), None)
    body = bytearray(b"[" + b"[]," * (MAX_RESPONSE_BYTES // 3 - 1) + b"[]]")

    def cpu_s() -> float:
        started = thread_time()
        with pytest.raises(CallError):
            client._read(body, 100, lambda _: None)
        return thread_time() - started

    assert min(cpu_s() for _ in range(5)) < 0.02  # 0.06 s for 1 MiB


@pytest.mark.parametrize(
    "respond",
    [
        raw(b"H", drip_s=30),
        raw(HEAD + b"Content-Length: 1000\r\n\r\n", drip_s=30),
        lambda handler, _: drip(handler, HEAD + b"Content-Length: 1000\r\n\r\n", b"x"),
        lambda handler, _: drip(handler, b"HTTP/1.1 200 OK\r\n", b"X: 1\r\n"),
        lambda handler, _: drip(handler, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_a_slow_response_ends_at_the_time_limit(tmp_path: Path, upstream: Service, respond: Respond) -> None:
    upstream.respond = respond
    found = failure(tmp_path, upstream.url, timeout_s=0.3)
    assert (found.why, found.may_retry, found.is_outage) == ("timeout", True, True)
    assert str(found) == "no answer within 0.3 s"


def drip(handler: BaseHTTPRequestHandler, start: bytes, part: bytes) -> None:
    """Send a part again and again until the client closes the connection."""
    handler.close_connection = True
    handler.wfile.write(start)
    while True:
        handler.wfile.write(part)
        sleep(0.01)


def test_an_address_without_a_service(tmp_path: Path) -> None:
    found = failure(tmp_path, f"http://127.0.0.1:{free_port()}/v1")
    assert (found.why, found.may_retry, found.is_outage) == ("connection", True, True)
    assert str(found) == "it cannot be reached (Connection refused)"
    assert failure(tmp_path, "https://a-host.invalid/v1").why == "connection"
    with service() as plain:
        found = failure(tmp_path, plain.url.replace("http:", "https:"))
        assert (found.why, found.may_retry) == ("connection", True)
        assert "SSLError" not in str(found)
        assert "permitted" not in str(found)


def test_a_second_response_does_not_answer_the_next_text(tmp_path: Path, upstream: Service) -> None:
    """A connection is used for one call."""

    def twice(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        content = json.dumps(reply("refund" if "first" in str(body) else "billing")).encode()
        handler.close_connection = "first" not in str(body)
        handler.wfile.write(2 * (HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content))

    async def calls() -> list[int]:
        client = Client(model_of(tmp_path, LABELS, chat(upstream.url)), None)
        found = [(await client.call(Text(name), 30, lambda _: None)).label for name in ("first", "second")]
        await client.close()
        return found

    upstream.respond = twice
    assert asyncio.run(calls()) == [1, 0]
    assert all("Authorization" not in headers for headers in upstream.headers)


@pytest.mark.parametrize(
    ("respond", "received"),
    [
        (answer(gzip.compress(b"{}"), Content_Encoding="gzip"), 0),
        (raw(HEAD + b"Content-Length: 2000000\r\n\r\n" + b"x" * 2_000_000), MAX_RESPONSE_BYTES),
        (raw(HEAD + b"Content-Length: 5000\r\n\r\n" + b"x" * 4000), 4000),
        (raw(b""), 0),
        (answer({}), 2),
        (answer({}, 500), None),
        (answer({}, 401), None),
    ],
)
def test_a_failed_call_is_charged_for_what_may_have_been_read_and_written(
    tmp_path: Path, upstream: Service, respond: Respond, received: int | None
) -> None:
    """By an estimate from the bytes; a call that ends with an error's status costs nothing."""
    upstream.respond = respond
    _, used = failure_and_usage(tmp_path, upstream.url)
    if received is None:
        assert used == []
        return
    (usage,) = used
    assert 10 < usage.input < 100
    assert received / 4 <= usage.output <= received / 4 + 2**14


def test_a_call_that_is_not_sent_costs_nothing(tmp_path: Path) -> None:
    assert failure_and_usage(tmp_path, f"http://127.0.0.1:{free_port()}/v1")[1] == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key, in one file."""
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout key.pem -out cert.pem"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


def test_a_self_signed_certificate(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(lambda _: "billing", certificate=certificate) as encrypted:
        url = encrypted.url.replace("http://127.0.0.1", "https://localhost")
        found = failure(tmp_path, url)
        assert (found.why, found.may_retry) == ("connection", True)
        assert "self-signed certificate" in str(found)
        assert encrypted.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
        assert call(tmp_path, url)[0].label == 0
        assert "IP address mismatch" in str(failure(tmp_path, url.replace("localhost", "127.0.0.1")))
        assert len(encrypted.requests) == 1


def test_proxies_of_the_environment_are_not_used(
    tmp_path: Path, upstream: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bytes]()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                seen.append(connection.recv(1000))
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        proxy = f"http://127.0.0.1:{listening.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.lower(), proxy)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password y\n")
        assert call(tmp_path, upstream.url)[0].label == 0
        assert failure(tmp_path, f"https://127.0.0.1:{free_port()}/v1").why == "connection"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(60)
    assert seen == []
    assert upstream.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_cookie_is_not_sent_back(tmp_path: Path, upstream: Service) -> None:
    """It would tell the upstream that two texts come from one server, and a client's cookie would be all clients'."""
    upstream.respond = lambda handler, _: send(handler, reply("billing"), Set_Cookie="id=1; Path=/")

    async def ask() -> int:
        client = Client(model_of(tmp_path, LABELS, chat(upstream.url)), KEY)
        for _ in range(2):
            await client.call(Text("a text"), 30, lambda _: None)
        kept = len(client._open().cookies.jar)
        await client.close()
        return kept

    assert asyncio.run(ask()) == 0
    assert not any("cookie" in name.lower() for headers in upstream.headers for name in headers)


def test_a_cancelled_call_closes_its_connection(tmp_path: Path, upstream: Service) -> None:
    upstream.gate.clear()

    async def cancelled() -> None:
        client = Client(model_of(tmp_path, LABELS, chat(upstream.url)), KEY)
        running = asyncio.ensure_future(client.call(Text("x"), 30, lambda _: None))
        await asyncio.to_thread(until, lambda: upstream.running == 1, "the request")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        upstream.gate.set()
        assert (await client.call(Text("y"), 30, lambda _: None)).label == 0
        await client.close()

    asyncio.run(cancelled())


def test_a_response_in_tiny_chunks_does_not_hold_the_event_loop(tmp_path: Path, upstream: Service) -> None:
    """What is read at once is parsed without a break, in the CPU time of one step of the loop."""
    upstream.respond = raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000)
    steps = list[float]()

    async def watch() -> None:
        while True:
            started = thread_time()
            await asyncio.sleep(0)
            steps.append(thread_time() - started)

    async def go() -> None:
        watching = asyncio.create_task(watch())
        client = Client(model_of(tmp_path, LABELS, chat(upstream.url)), KEY)
        with pytest.raises(CallError):
            await client.call(Text("a text"), 30, lambda _: None)
        watching.cancel()
        await client.close()

    asyncio.run(go())
    assert sorted(steps)[-2] < 0.03  # the longest step creates the client
