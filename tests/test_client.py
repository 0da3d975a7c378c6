"""Our own client, against a running server."""

import asyncio
import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from de3 import client as de3_client
from de3.client import AsyncClient, Client, ServerError
from tests.fixtures import make_rows
from tests.serving import Server, serving
from tests.upstream import service

TEXTS = [text for text, _ in make_rows(100, 11)]
every_client = pytest.mark.parametrize("kind", [Client, AsyncClient])


@pytest.fixture(scope="module")
def server(several: Path) -> Iterator[Server]:
    with serving(several, models=["tiny", "mood"], max_texts=64) as running:
        yield running


def call(
    kind: Callable[..., Any],
    url: str,
    *given: Any,
    options: Mapping[str, Any] | None = None,
    method: str = "classify",
    **settings: Any,
) -> Any:
    """What a client of this kind returns. given: the arguments of the method."""
    if kind is Client:
        with Client(url, **settings) as client:
            return getattr(client, method)(*given, **options or {})

    async def go() -> Any:
        async with AsyncClient(url, **settings) as client:
            return await getattr(client, method)(*given, **options or {})

    return asyncio.run(go())


def refused(kind: Callable[..., Any], url: str, **settings: Any) -> ServerError:
    with pytest.raises(ServerError) as caught:
        call(kind, url, "good", **settings)
    return caught.value


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

    stopped, firsts = threading.Event(), iter(first)

    def respond(handler: BaseHTTPRequestHandler, _: object) -> None:
        handler.close_connection = True
        answer = next(firsts, None)
        for part in parts if answer is None else [answer]:
            handler.wfile.write(part)
            stopped.wait(pause_s)

    with service() as one:
        one.respond = respond
        yield f"http://127.0.0.1:{one.port}"
        stopped.set()


GOOD_EXIT = {"layer": 1, "num_layers": 3, "reason": "threshold"}
ROW = {"label": "good", "probs": [1.0], "exit": GOOD_EXIT}
WHOLE = {"data": [ROW], "model": "m:1", "usage": {"total_tokens": 3}}
ANSWER = response(json.dumps(WHOLE).encode())


@every_client
def test_several_models_answer_as_each_alone(server: Server, kind: Callable[..., Any]) -> None:
    models: list[Any] = ["mood", {"model": "tiny", "max_disagreement": 0.5}]
    ask = partial(call, kind, method="classify_several")
    alone = [
        call(kind, server.url, TEXTS, options=options, max_texts=64)
        for options in ({"model": "mood", "tau": 0.9}, models[1])
    ]
    for most in (64, 7):
        answers = ask(server.url, TEXTS, models, options={"tau": 0.9}, max_texts=most)
        for one, other in zip(answers, alone, strict=True):
            assert (one.model, one.rows, one.tokens) == (other.model, other.rows, other.tokens)
            assert one.raw.keys() == other.raw.keys()
    with pytest.raises(ServerError, match=r"models\[1\].lambda: ") as error:
        ask(server.url, TEXTS[:9], ["mood", {"model": "tiny", "lam": -1}])
    assert (error.value.status, error.value.field) == (422, "models[1].lambda")
    assert {one["id"] for one in call(kind, server.url, method="models")} == {"tiny:1", "mood:1"}
    part = {"data": [ROW], "model": "m:1"}
    with answering(response(json.dumps({"usage": WHOLE["usage"], "results": [part]}).encode())) as url:
        assert ask(url, "good", ["m"])[0].raw == WHOLE
        with pytest.raises(ServerError, match="1 results for 2 models"):
            ask(url, "good", ["m", "n"])


@every_client
def test_a_call_with_more_texts_than_the_server_allows_is_several_requests(
    server: Server, kind: Callable[..., Any]
) -> None:
    options = {"model": "tiny", "max_disagreement": 0.5}
    ask = partial(call, kind, server.url)
    parts = [server.classify(input=TEXTS[i : i + 40], **options).json() for i in (0, 40, 80)]
    rows = [row for part in parts for row in part["data"]]
    tokens = sum(part["usage"]["total_tokens"] for part in parts)
    answer = ask(TEXTS, options=options | {"explain": None}, max_texts=40)
    assert answer.raw["data"] == [row | {"index": index} for index, row in enumerate(rows)]
    assert [row.raw for row in answer.rows] == answer.raw["data"] and answer.tokens == tokens
    assert answer.raw["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    assert answer.raw["certificate"] == parts[0]["certificate"]
    (pair,) = ask(("good film", "a dull plot"), options={"model": "tiny", "tau": 0, "lam": 2}).rows
    assert (pair.exit.lam, pair.exit.layer) == (2, 3)
    answer = ask(["good " * 2**17] * 3, options={"model": "tiny"})  # more bytes than it allows
    assert [row.truncated for row in answer.rows] == [True] * 3
    long = ["good", " ".join(["good"] * 100)]
    for texts in (long, long[::-1]):
        answer = ask(texts, options=options | {"long": "windows"}, max_texts=1)
        assert "certificate" not in answer.raw  # it holds for texts of one window
    for most, index in ((40, 70), (33, 99), (1, 0)):  # the last two are alone in their requests
        texts = [*TEXTS[:index], " ", *TEXTS[index + 1 :]]
        with pytest.raises(ServerError, match=rf"^input\[{index}\]: must not be only white space") as error:
            ask(texts, options={"model": "tiny"}, max_texts=most)
        assert error.value.field == ("input" if index == 70 else f"input[{index}]")
    for text, says in ((float("nan"), "got nan"), (("good", None), "got None"), ("\ud800", "half of a sur")):
        with pytest.raises(ValueError, match=rf"^input\[3\]: .*{says}"):
            call(kind, "http://127.0.0.1:9", [*TEXTS[:3], text])  # nothing is sent
    with (
        answering(response(json.dumps(WHOLE | {"model": "m:2"}).encode()), first=[ANSWER]) as url,
        pytest.raises(ServerError, match=r"several models answered \(m:1, m:2\)"),
    ):
        call(kind, url, ["good", "bad"], max_texts=1)


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
        # These are not numbers of seconds.
        *((response(b"busy", 503, retry_after=after), 503, "busy") for after in ("\xb2", "9" * 400, "1e3")),
    ],
    ids=lambda value: "sent" if isinstance(value, bytes) else None,
)
def test_a_malformed_answer_is_a_server_error(sent: bytes, status: int, says: str) -> None:
    with answering(sent) as url:
        for kind in (Client, AsyncClient):
            error = refused(kind, url)
            assert re.search(says, str(error)), error
            assert (error.status, error.retry_after_s) == (status, None)


@every_client
def test_an_answer_may_be_compressed_and_is_limited_when_it_is_decompressed(kind: Callable[..., Any]) -> None:
    body = json.dumps(WHOLE).encode()
    for status in (200, 500):
        with answering(response(gzip.compress(body), status, content_encoding="gzip")) as url:
            error = refused(kind, url, max_answer_bytes=len(body) - 1)
            assert error.status == status and f"more than {len(body) - 1} bytes" in str(error)
            if status == 200:
                assert call(kind, url, "good", max_answer_bytes=len(body)).raw == WHOLE


@pytest.mark.parametrize(
    ("after", "pauses"), [("0", [0.1, 0.2, 0.4, 0.8]), ("1", [1.0] * 4), ("100", [30.0] * 4)]
)
@every_client
def test_a_refused_request_is_retried_after_pauses_that_grow(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[..., Any], after: str, pauses: list[float]
) -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    sleeping = {"time": SimpleNamespace(sleep=slept.append)}
    sleeping["asyncio"] = SimpleNamespace(sleep=sleep, timeout=asyncio.timeout)
    for name, module in sleeping.items():
        monkeypatch.setattr(de3_client, name, module)
    busy = response(b"busy", 429, retry_after=after)
    with answering(ANSWER, first=[busy] * 4) as url:
        assert call(kind, url, "good").raw == WHOLE
    for seconds, least in zip(slept, pauses, strict=True):
        assert least <= seconds <= 1.5 * least
    assert slept != pauses or after == "100"  # clients that are refused together come back at different times
    slept.clear()
    with answering(busy) as url:
        assert refused(kind, url, retries=2).retry_after_s == float(after) and len(slept) == 2
    slept.clear()
    for unusual in (response(b"busy", 500, retry_after=after), response(b"busy", 503)):
        with answering(unusual) as url:
            assert "busy" in str(refused(kind, url))
    assert slept == []


def test_the_time_of_an_answer_is_limited_in_total() -> None:
    """Each byte arrives within the timeout, but the whole answer does not."""
    sent = response(b"x" * 1000)
    slow_body, slow_head = [sent[:-1000], *[b"x"] * 1000], [bytes([byte]) for byte in sent]
    with (
        answering(*slow_body, pause_s=0.05) as body,
        answering(*slow_head, pause_s=0.05) as head,
        ThreadPoolExecutor(4) as pool,
    ):
        both_ways = product((body, head), (Client, AsyncClient))
        calls = [(url, pool.submit(call, kind, url, "good", timeout_s=1.0)) for url, kind in both_ways]
        for url, one in calls:
            error = one.exception(timeout=20)
            assert isinstance(error, ServerError) and "incomplete within 1 s" in str(error)
            assert error.status == (200 if url == body else 0)
