"""A call of an upstream that misbehaves, on a real socket: each failure has its kind, and shows no secret."""

import asyncio
import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from time import sleep, time
from types import FrameType
from typing import Any

import pytest

from de3.runtime.engine.request import Text
from de3.runtime.upstream.client import (
    MAX_RESPONSE_BYTES,
    MAX_RETRY_AFTER_S,
    MAX_TOKENS,
    CallError,
    Client,
    Reply,
    Usage,
)
from tests.serving import free_port
from tests.upstream import KEY, Service, chat, model_of, reply, send, service

LABELS = ["billing", "refund", "card lost", "other"]
SECRET = "a-secret-in-the-url"
Respond = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with service(lambda _: "billing") as one:
        yield one


@pytest.fixture
def upstream(running: Service) -> Service:
    running.respond = None
    running.requests.clear()
    running.headers.clear()
    return running


class Caller:
    """Calls upstreams from one event loop, each with one client, as creating a client takes long."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clients, self.loop = folder, dict[str, Client](), asyncio.Runner()

    def call(
        self, url: str, text: Text | str = "a text", timeout_s: float = 30, **fields: Any
    ) -> tuple[Reply | CallError, list[Usage]]:
        """The answer or the error of one call, and the tokens that were counted."""
        text, used, which = Text(text) if isinstance(text, str) else text, list[Usage](), f"{url} {fields}"

        async def one() -> Reply:
            if which not in self.clients:
                of = model_of(self.folder, LABELS, chat(f"{url}?key={SECRET}", **fields))
                self.clients[which] = Client(of, KEY)
            return await self.clients[which].call(text, timeout_s, used.append)

        try:
            return self.loop.run(one()), used
        except CallError as error:
            for shown in (str(error), repr(error)):
                assert not any(secret in shown for secret in (KEY, SECRET, "a text"))
            assert error.__cause__ is None
            return error, used

    def answer(self, url: str, **more: Any) -> tuple[Reply, Usage]:
        """The answer of one call, and its tokens."""
        found, (used,) = self.call(url, **more)
        assert isinstance(found, Reply), found
        return found, used

    def failure(self, url: str, **more: Any) -> CallError:
        """The error of one call."""
        found, _ = self.call(url, **more)
        assert isinstance(found, CallError)
        return found


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    one = Caller(tmp_path_factory.mktemp("caller"))
    yield one
    for client in one.clients.values():
        one.loop.run(client.close())
    one.loop.close()


def test_a_chat_gets_the_prompt_the_key_and_the_parameters(caller: Caller, upstream: Service) -> None:
    parameters = {"temperature": 0, "max_tokens": 8, "stop": ["\n"]}
    text = "a {text} with {labels}, {0}, % and \\1 ünïcode"
    found = caller.answer(upstream.url, text=text, parameters=parameters, prompt="{labels}: {text} {x}")
    assert found == (Reply(0, None, False), Usage(100, 10))
    (body,), (headers,) = upstream.requests, upstream.headers
    message = {"role": "user", "content": f"billing, refund, card lost, other: {text} {{x}}"}
    assert body == {"model": "some-model", "messages": [message], **parameters}
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Accept-Encoding"] == "identity"
    caller.answer(upstream.url, text=Text("{text_pair}", "{text}"), prompt="1 {text} 2 {text_pair}")
    assert upstream.requests[1]["messages"][0]["content"] == "1 {text_pair} 2 {text}"


def test_classify_gives_probabilities_that_agree_with_the_label(caller: Caller, upstream: Service) -> None:
    of: dict[str, Any] = {"kind": "classify", "model": None, "prompt": None, "parameters": {"priority": 1}}
    row: dict[str, Any] = {"label": "Refund", "probs": [0.1, 0.7, 0.1, 0.1]}
    upstream.respond = answer({"data": [row]})
    found, used = caller.answer(upstream.url, text=Text("one", "two"), **of)
    assert found == Reply(1, [0.1, 0.7, 0.1, 0.1], False)
    assert upstream.requests[0] == {"input": {"text": "one", "text_pair": "two"}, "priority": 1}
    assert min(used.input, used.output) > 0
    wrong: list[Any] = [None, [0.7, 0.1, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.1, 0.7], [0.1, 0.9, 0.5, 0.1]]
    for probs in (*wrong, [0, True, 0, 0], ["0", "1", "0", "0"], [-0.1, 1, 0.1, 0], {"refund": 1}):
        row["probs"] = probs
        assert caller.answer(upstream.url, **of)[0] == Reply(1, None, False)
    row["label"] = "It is refund"  # a classifier's label has no words around it
    assert caller.failure(upstream.url, **of).why == "reply"


def raw(content: bytes, drip_s: float = 0.0, again: bytes = b"") -> Respond:
    """A response of these bytes, after which others are sent again and again; then the connection closes."""

    def respond(handler: BaseHTTPRequestHandler, _: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(content)
        sleep(drip_s)
        while again:
            handler.wfile.write(again)
            sleep(drip_s)

    return respond


def answer(body: Any, status: int = 200, **headers: str) -> Respond:
    return lambda handler, _: send(handler, body, status, **headers)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
MANY = b"x" * 2**16


CONTENT = [{"type": "text", "text": "billing"}]
BAD_CHOICES: list[Any] = [
    [],
    [None],
    [{"message": "x"}],
    [{"message": {"content": CONTENT}}],
    {"0": {"message": {}}},
]
BAD_BODIES = [b"", b"\xff", b"null", b"[" * 100_000, [], *({"choices": bad} for bad in BAD_CHOICES)]
NO_LABEL = [reply("billing or refund"), reply(None, refusal="I cannot."), {"choices": [{"message": {}}]}]
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("why", "may_retry", "is_outage", "responses"),
    [
        ("invalid", False, True, [answer(body) for body in BAD_BODIES]),
        ("invalid", False, True, [answer(gzip.compress(b"{}"), Content_Encoding="gzip")]),
        ("invalid", False, True, [raw(HEAD + b"\r\n", 0.001, MANY)]),  # without end
        ("reply", True, False, [answer(body) for body in NO_LABEL]),
        ("refused", False, False, [answer({}, status) for status in (400, 413, 422)]),
        ("refused", False, True, [answer({"error": KEY}, status) for status in (201, 401, 403, 404)]),
        (
            "redirect",
            False,
            True,
            [answer({}, status, Location="/?key=" + SECRET) for status in (301, 303, 307)],
        ),
        ("rate_limited", True, True, [answer({}, 429)]),
        ("server_error", True, True, [answer({}, 500)]),
        ("connection", True, True, [raw(b""), raw(b"SSH-2.0\r\n"), raw(CHUNKED + b"5\r\nab")]),
        ("connection", True, True, [raw(HEAD + b"X: " + 16 * MANY + b"\r\n\r\n{}")]),
        ("timeout", True, True, [raw(b"H", 30), raw(CHUNKED, 0.01, b"1\r\nx\r\n")]),
        ("timeout", True, True, [raw(b"", 0.01, b"HTTP/1.1 100 Continue\r\n\r\n")]),
    ],
)
def test_a_response_that_is_no_answer(
    caller: Caller, upstream: Service, why: str, may_retry: bool, is_outage: bool, responses: list[Respond]
) -> None:
    for upstream.respond in responses:
        found = caller.failure(upstream.url, timeout_s=0.2 if why == "timeout" else 30)
        assert (found.why, found.may_retry, found.is_outage) == (why, may_retry, is_outage), str(found)
        assert found.retry_after_s is None
        assert found.is_certain == ("HTTP 401" in str(found))  # no text can cause it
    assert why == "timeout" or len(upstream.requests) == len(responses)


def test_a_failed_call_is_charged_for_what_may_have_been_read(caller: Caller, upstream: Service) -> None:
    """By an estimate from the bytes; a call that ends with an error's status costs nothing."""
    responses: list[tuple[Respond, int | None]] = [
        (answer(gzip.compress(b"{}"), Content_Encoding="gzip"), 0),
        (raw(HEAD + b"\r\n", 0.001, MANY), MAX_RESPONSE_BYTES),
        (raw(HEAD + b"Content-Length: 5000\r\n\r\n" + MANY[:4000]), 4000),
        (raw(b""), 0),
        (answer({}), 2),
        (answer({}, 500), None),
        (answer({}, 401), None),
    ]
    for upstream.respond, received in responses:
        _, used = caller.call(upstream.url)
        assert len(used) == (received is not None)
        for usage in used:
            assert 10 < usage.input < 100
            assert (received or 0) / 4 <= usage.output <= (received or 0) / 4 + 2**14


def test_retry_after(caller: Caller, upstream: Service) -> None:
    for value, seconds in (
        ("7", 7),
        ("0", 0),
        ("1.5", 1.5),
        ("99999999", MAX_RETRY_AFTER_S),
        ("1e999", None),
        ("-3", None),
        ("", None),
        ("Fri, 99 Foo 9999 99:99:99 GMT", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        (formatdate(time() + 100, usegmt=True), pytest.approx(70, abs=30)),
    ):
        for status in (429, 503):
            upstream.respond = answer({}, status, Retry_After=value)
            assert caller.failure(upstream.url).retry_after_s == seconds


def test_an_answer_is_read_whatever_is_around_it(caller: Caller, upstream: Service) -> None:
    """Neither the content type nor fields that are not used matter; a response without usage has an estimate."""
    for usage in (
        None,
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": MAX_TOKENS + 1, "completion_tokens": MAX_TOKENS + 1},
        "much",
    ):
        upstream.respond = answer({**reply("Refund!"), "usage": usage, "x": [1]}, Content_Type="text/html")
        found, used = caller.answer(upstream.url)
        assert found == Reply(1, None, False)
        assert 0 < min(used.input, used.output) <= max(used.input, used.output) < 100
    upstream.respond = answer(reply("The label is 'card-lost'."))
    assert caller.answer(upstream.url)[0] == Reply(2, None, True)
    assert caller.failure(upstream.url, reply="exact").why == "reply"


def test_an_address_without_a_service(caller: Caller, upstream: Service) -> None:
    for url in (
        f"http://127.0.0.1:{free_port()}/v1",
        "https://a-host.invalid/v1",
        upstream.url.replace("http:", "https:"),
    ):
        found, used = caller.call(url)
        assert isinstance(found, CallError)
        assert (found.why, found.may_retry, found.is_outage, found.is_certain) == (
            "connection",
            True,
            True,
            True,
        )
        assert used == []  # a call that is not sent costs nothing
        assert "SSLError" not in str(found)


def test_a_second_response_does_not_answer_the_next_text(caller: Caller, upstream: Service) -> None:
    """A connection is used for one call. Nor is a cookie sent back: it would tell that two texts have one sender."""

    def twice(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        content = json.dumps(reply("refund" if "first" in str(body) else "billing")).encode()
        handler.close_connection = "first" not in str(body)
        head = HEAD + b"Set-Cookie: id=1; Path=/\r\nContent-Length: %d\r\n\r\n" % len(content)
        handler.wfile.write(2 * (head + content))

    upstream.respond = twice
    assert [caller.answer(upstream.url, text=name)[0].label for name in ("first", "second")] == [1, 0]
    assert not any("cookie" in name.lower() for headers in upstream.headers for name in headers)


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
    caller: Caller, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(lambda _: "billing", certificate=certificate) as encrypted:
        url = encrypted.url.replace("http://127.0.0.1", "https://localhost")
        found = caller.failure(url)
        assert (found.why, found.may_retry) == ("connection", True)
        assert "self-signed certificate" in str(found)
        assert encrypted.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("cert.pem")))
        assert caller.answer(f"{url}/")[0].label == 0  # by a client that was made since then
        assert "IP address mismatch" in str(caller.failure(url.replace("localhost", "127.0.0.1")))
        assert len(encrypted.requests) == 1


def test_proxies_of_the_environment_are_not_used(
    caller: Caller, upstream: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for spelled in (name, name.lower()):
                monkeypatch.setenv(spelled, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password y\n")
        assert caller.answer(f"{upstream.url}/")[0].label == 0  # by a new client
        assert caller.failure(f"https://127.0.0.1:{free_port()}/v1").why == "connection"
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            proxy.accept()
    assert upstream.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_response_in_tiny_chunks_does_not_hold_the_event_loop(caller: Caller, upstream: Service) -> None:
    """What is read at once is parsed without a break: a few hundred chunks, in some calls of functions each."""
    chunks, calls, most = 8000, 0, 0
    upstream.respond = raw(CHUNKED + b"1\r\nx\r\n" * chunks)

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls, most
        if event == "call":
            calls = 0 if frame.f_code.co_name == "_run_once" else calls + 1  # an iteration of the event loop
            most = max(most, calls)

    sys.setprofile(count)
    caller.failure(upstream.url)
    sys.setprofile(None)
    assert 1000 < most < 10 * chunks
