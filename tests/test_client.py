"""Our own client, against a running server."""

import asyncio
import gzip
import json
import re
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.client import parse_headers
from inspect import signature
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from de3 import client as de3_client
from de3.client import Answer, AsyncClient, Client, ServerError
from tests.fixtures import make_rows
from tests.serving import Server, serving

TEXTS = [text for text, _ in make_rows(100, 11)]


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny", "tiny-int8"], max_texts=64) as running:
        yield running


def test_both_clients_return_the_servers_answer(server: Server) -> None:
    expected = server.classify(input=TEXTS[:5], tau=0.1, model="tiny").json()
    options = {"tau": 0.1, "model": "tiny", "explain": None}
    for call in CALLS:
        answer = call(server.url, TEXTS[:5], options=options)
        assert [row.raw for row in answer.rows] == expected["data"]
        assert (answer.model, answer.tokens) == ("tiny:1", expected["usage"]["total_tokens"])
        first = answer.rows[0]
        assert first.exit.lam == first.raw["exit"]["lambda"] and first.label == first.raw["label"]
        (pair,) = call(server.url, ("good film", "a dull plot"), options={"tau": 0, "lam": 2}).rows
        assert (pair.exit.lam, pair.exit.layer) == (2, 3)
        assert [m["id"] for m in call(server.url, method="models")] == ["tiny:1", "tiny-int8:1"]

    async def go() -> list[Answer]:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(*(client.classify(text, tau=0.1, model="tiny") for text in TEXTS[:5]))

    assert [answer.rows[0].label for answer in asyncio.run(go())] == [
        row["label"] for row in expected["data"]
    ]


def test_several_models_answer_as_each_alone(several: Path) -> None:
    models = ["mood", {"model": "tiny", "max_disagreement": 0.5}]
    part = {"data": [ROW], "model": "m:1"}
    whole = response(json.dumps({"usage": WHOLE["usage"], "results": [part]}).encode())
    with (
        serving(several, models=["tiny", "mood"]) as server,
        Client(server.url) as client,
        answering(whole) as url,
    ):
        alone = [client.classify(TEXTS, model="mood", tau=0.9), client.classify(TEXTS, **models[1])]
        for ask in CALLS:
            call = partial(ask, method="classify_several")
            for most in (100, 7):
                answers = call(server.url, TEXTS, models, options={"tau": 0.9}, max_texts=most)
                for one, other in zip(answers, alone, strict=True):
                    assert (one.model, one.rows, one.tokens) == (other.model, other.rows, other.tokens)
                    assert one.raw.keys() == other.raw.keys()
            (one,) = call(server.url, TEXTS[0], ["tiny"])
            assert one.rows == client.classify(TEXTS[0], model="tiny").rows
            with pytest.raises(ServerError, match=r"^input\[70\]: must not be only white space"):
                call(server.url, [*TEXTS[:70], " "], models, max_texts=10)
            with pytest.raises(ServerError, match=r"models\[1\].lambda: ") as error:
                call(server.url, TEXTS, ["mood", {"model": "tiny", "lam": -1}])
            assert error.value.field == "models[1].lambda"
            assert call(url, "good", ["m"])[0].raw == WHOLE
            with pytest.raises(ServerError, match="1 results for 2 models"):
                call(url, "good", ["m", "n"])


def test_errors_name_the_field(server: Server) -> None:
    for error in both(server.url, options={"tau": 2}):
        assert (error.status, error.field, error.retry_after_s) == (422, "tau", None)
        assert "allowed: 0 to 1" in str(error)


def response(body: bytes, status: int = 200, **headers: str) -> bytes:
    fields = {"content-length": str(len(body)), "connection": "close"} | {
        name.replace("_", "-"): v for name, v in headers.items()
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} x\r\n{head}\r\n".encode("latin-1") + body


@contextmanager
def answering(*parts: bytes, pause_s: float = 0.0, first: Sequence[bytes] = ()) -> Iterator[str]:
    """The URL of a server that answers each request with these parts, with a pause after each.

    first: the answers to the first requests.
    """

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.rfile.read(
                int(parse_headers(self.rfile)["content-length"])
            )  # else closing resets the connection
            answer = next(firsts, None)
            with suppress(OSError):
                for part in parts if answer is None else [answer]:
                    self.request.sendall(part)
                    stopped.wait(pause_s)

    stopped, firsts = threading.Event(), iter(first)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            stopped.set()
            server.shutdown()


NO_OPTIONS: Mapping[str, Any] = {}


def ask(
    url: str, *given: Any, options: Mapping[str, Any] = NO_OPTIONS, method: str = "classify", **settings: Any
) -> Any:
    """What a client returns. given: the arguments of the method; default: a text."""
    with Client(url, **settings) as client:
        return getattr(client, method)(*given or ["good"][: method != "models"], **options)


def ask_async(
    url: str, *given: Any, options: Mapping[str, Any] = NO_OPTIONS, method: str = "classify", **settings: Any
) -> Any:
    async def go() -> Any:
        async with AsyncClient(url, **settings) as client:
            return await getattr(client, method)(*given or ["good"][: method != "models"], **options)

    return asyncio.run(go())


CALLS: list[Callable[..., Any]] = [ask, ask_async]


def both(url: str, **options: Any) -> list[ServerError]:
    """The errors that the client and the async client raise, each for one request."""
    errors = []
    for call in CALLS:
        with pytest.raises(ServerError) as caught:
            call(url, **options)
        errors.append(caught.value)
    return errors


GOOD_EXIT = {"layer": 1, "num_layers": 3, "reason": "threshold"}
ROW = {"label": "good", "probs": [1.0], "exit": GOOD_EXIT}
WHOLE = {"data": [ROW], "model": "m:1", "usage": {"total_tokens": 3}}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_with_more_texts_than_the_server_allows_is_several_requests(
    server: Server, call: Callable[..., Answer]
) -> None:
    options = {"model": "tiny", "max_disagreement": 0.5}
    parts = [server.classify(input=TEXTS[i : i + 40], **options).json() for i in (0, 40, 80)]
    rows = [row for part in parts for row in part["data"]]
    tokens = sum(part["usage"]["total_tokens"] for part in parts)
    answer = call(server.url, TEXTS, options=options, max_texts=40)
    assert answer.raw["data"] == [row | {"index": index} for index, row in enumerate(rows)]
    assert [row.raw for row in answer.rows] == answer.raw["data"] and answer.tokens == tokens
    assert answer.raw["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert answer.raw["certificate"] == parts[0]["certificate"]
    answer = call(server.url, ["good " * 2**17] * 3, options={"model": "tiny"})  # more bytes than it allows
    assert [row.truncated for row in answer.rows] == [True] * 3
    long = ["good", " ".join(["good"] * 100)]
    for texts in (long, long[::-1]):
        answer = call(server.url, texts, options=options | {"long": "windows"}, max_texts=1)
        assert "certificate" not in answer.raw  # it holds for texts of one window
    for most, index in ((40, 70), (33, 99), (1, 0)):  # the last two are alone in their requests
        texts = [*TEXTS[:index], " ", *TEXTS[index + 1 :]]
        with pytest.raises(ServerError, match=rf"^input\[{index}\]: must not be only white space") as error:
            call(server.url, texts, options={"model": "tiny"}, max_texts=most)
        assert error.value.field == ("input" if index == 70 else f"input[{index}]")
    wrong: list[tuple[Any, str]] = [(float("nan"), "must be a text .* got nan"), (("good", None), "got None")]
    for text, says in [*wrong, ("\ud800", "half of a surrogate pair")]:
        with pytest.raises(ValueError, match=rf"^input\[3\]: .*{says}"):
            call("http://127.0.0.1:9", [*TEXTS[:3], text])  # nothing is sent
    with pytest.raises(ServerError, match=r"^input: 100 texts; at most 64 are allowed"):
        call(server.url, TEXTS)
    first = response(json.dumps(WHOLE).encode())
    with (
        answering(response(json.dumps(WHOLE | {"model": "m:2"}).encode()), first=[first]) as url,
        pytest.raises(ServerError, match=r"several models answered \(m:1, m:2\)"),
    ):
        call(url, ["good", "bad"], max_texts=1)


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (response(b"<html>bad gateway", 502), 502, "HTTP 502: <html>"),
        (response(b"[" * 100_000, 503), 503, r"HTTP 503: \[\["),
        (response(b"{", retry_after="1"), 200, "malformed answer .*JSONDecodeError"),
        (response(b"[" * 100_000), 200, "malformed answer .*RecursionError"),
        (response(b'{"data": [[]], "model": "m"}'), 200, "malformed answer"),
        (response(b'{"data": [], "model": "m", "usage": {"total_tokens": 1}}'), 200, "0 rows for 1 texts"),
        (response(b"x", content_encoding="br"), 200, "the Content-Encoding is br"),
        (response(b"xx", content_encoding="gzip"), 200, "not gzip"),
        (response(gzip.compress(b"x" * 99)[:20], content_encoding="gzip"), 200, "incomplete gzip"),
    ],
    ids=lambda value: "sent" if isinstance(value, bytes) else None,
)
def test_a_malformed_answer_is_a_server_error(sent: bytes, status: int, says: str) -> None:
    with answering(sent) as url:
        for error in both(url):
            assert isinstance(error, ServerError) and re.search(says, str(error)), error
            assert (error.status, error.retry_after_s) == (status, None)


def test_an_answer_may_be_compressed_and_is_limited_when_it_is_decompressed() -> None:
    body = json.dumps(WHOLE).encode()
    for status in (200, 500):
        with answering(response(gzip.compress(body), status, content_encoding="gzip")) as url:
            for error in both(url, max_answer_bytes=len(body) - 1):
                assert error.status == status and f"more than {len(body) - 1} bytes" in str(error)
            if status == 200:
                for call in CALLS:
                    assert call(url, max_answer_bytes=len(body)).raw == WHOLE
    for client in (Client, AsyncClient):
        assert signature(client).parameters["max_answer_bytes"].default == 2**26


@pytest.mark.parametrize(
    ("after", "pauses"), [("0", [0.15, 0.3, 0.6, 1.2]), ("1", [1.5, 1.5, 1.5, 1.5]), ("100", [30.0] * 4)]
)
@pytest.mark.parametrize("call", CALLS)
def test_a_refused_request_is_retried_after_pauses_that_grow(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Answer], after: str, pauses: list[float]
) -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(de3_client, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(de3_client, "asyncio", SimpleNamespace(sleep=sleep, timeout=asyncio.timeout))
    monkeypatch.setattr(de3_client, "random", SimpleNamespace(uniform=lambda low, high: high))
    busy = response(b"busy", 429, retry_after=after)
    with answering(response(json.dumps(WHOLE).encode()), first=[busy] * 4) as url:
        assert call(url).raw == WHOLE
    assert slept == pytest.approx(pauses)
    slept.clear()
    with answering(busy) as url, pytest.raises(ServerError) as refused:
        call(url, retries=2)
    assert refused.value.retry_after_s == float(after) and slept == pytest.approx(pauses[:2])
    slept.clear()
    for unusual in (response(b"busy", 500, retry_after=after), response(b"busy", 503)):
        with answering(unusual) as url, pytest.raises(ServerError, match="busy"):
            call(url)
    assert slept == []


@pytest.mark.parametrize("after", ["\xb2", "9" * 400, "-1", "1e3", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_retry_after_that_is_not_a_number_of_seconds_is_ignored(after: str) -> None:
    with answering(response(b"busy", 503, retry_after=after)) as url:
        for error in both(url):
            assert isinstance(error, ServerError) and error.retry_after_s is None


def test_the_time_of_an_answer_is_limited_in_total() -> None:
    """Each byte arrives within the timeout, but the whole answer does not."""
    sent = response(b"x" * 1000)
    slow_body, slow_head = [sent[:-1000], *[b"x"] * 1000], [bytes([byte]) for byte in sent]
    with (
        answering(*slow_body, pause_s=0.05) as body,
        answering(*slow_head, pause_s=0.05) as head,
        ThreadPoolExecutor(4) as pool,
    ):
        both_ways = product((body, head), CALLS)
        calls = [(url, pool.submit(call, url, timeout_s=1.0)) for url, call in both_ways]
        for url, call in calls:
            error = call.exception(timeout=20)
            assert isinstance(error, ServerError) and "incomplete within 1 s" in str(error)
            assert error.status == (200 if url == body else 0)
