"""Our own client and `de3 classify`, against a running server."""

import asyncio
import gzip
import json
import re
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from de3 import client as de3_client
from de3.client import AsyncClient, Client, ServerError
from tests.commands import de3, invoke
from tests.fixtures import make_rows
from tests.serving import Gate, Server, serving, until

TEXTS = [text for text, _ in make_rows(100, 11)]
KEY = "alice-has-a-long-key"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    with serving(store, models=["tiny", "tiny-int8"], max_texts=64) as running:
        yield running


def test_both_clients_return_the_servers_answer(server: Server) -> None:
    expected = server.classify(input=TEXTS[:5], tau=0.1, model="tiny").json()
    with Client(server.url) as client:
        answer = client.classify(TEXTS[:5], tau=0.1, model="tiny", explain=None)
        assert [row.raw for row in answer.rows] == expected["data"]
        assert (answer.model, answer.tokens) == ("tiny:1", expected["usage"]["total_tokens"])
        first = answer.rows[0]
        assert first.exit.lam == first.raw["exit"]["lambda"] and first.label == first.raw["label"]
        pair = client.classify(("good film", "a dull plot"), tau=0, lam=2).rows[0]
        assert (pair.exit.lam, pair.exit.layer) == (2, 3)
        assert [m["id"] for m in client.models()] == ["tiny:1", "tiny-int8:1"]

    async def go() -> list[Any]:
        async with AsyncClient(server.url) as other:
            answers = await asyncio.gather(*(other.classify(t, tau=0.1, model="tiny") for t in TEXTS[:5]))
            assert len(await other.models()) == 2
            return [a.rows[0].label for a in answers]

    assert asyncio.run(go()) == [row["label"] for row in expected["data"]]


def test_errors_name_the_field(server: Server) -> None:
    with Client(server.url) as client, pytest.raises(ServerError, match="allowed: 0 to 1") as error:
        client.classify("good", tau=2)
    assert (error.value.status, error.value.field, error.value.retry_after_s) == (422, "tau", None)


def test_a_refused_request_is_retried_after_the_servers_retry_after(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, pauses = Gate(monkeypatch), []
    with serving(store, models=["tiny"], max_queue=4, max_texts=4, threads=1) as server:

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            gate.open()  # the queue empties
            until(lambda: server.service.admission.texts.total == 0, "the room")

        monkeypatch.setattr(de3_client, "time", SimpleNamespace(sleep=pause))
        full = threading.Thread(target=lambda: server.classify(input=["good"] * 4))
        full.start()
        until(lambda: server.service.admission.texts.total == 4, "the queue to be full")
        with Client(server.url) as client:
            assert client.classify("good").rows[0].label in ("positive", "negative")
        full.join()
        assert len(pauses) == 1 and 1.0 <= pauses[0] <= 1.5  # Retry-After: 1


def test_a_request_that_cannot_succeed_is_not_retried(store: Path) -> None:
    with (
        serving(store, models=["tiny"], api_keys=f"alice {KEY}", rate_limit="3/hour") as server,
        Client(server.url, KEY) as client,
        pytest.raises(ServerError, match="costs 4 texts"),
    ):
        client.classify(["good"] * 4)
    assert server.metric("de3_rejected_total", cause="rate_limited") == 1


def response(body: bytes, status: int = 200, **headers: str) -> bytes:
    fields = {"content-length": str(len(body))} | {name.replace("_", "-"): v for name, v in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} x\r\n{head}\r\n".encode("latin-1") + body


@contextmanager
def answering(*parts: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """The URL of a server that answers each request with these parts, with a pause after each."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            with suppress(OSError):
                for part in parts:
                    self.request.sendall(part)
                    stopped.wait(pause_s)

    stopped = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            stopped.set()
            server.shutdown()


def both(url: str, **options: Any) -> list[Exception]:
    """The errors that the client and the async client raise, each for one request."""

    async def go() -> None:
        async with AsyncClient(url, **options) as client:
            await client.classify("good")

    errors = []
    for call in (lambda: Client(url, **options).classify("good"), lambda: asyncio.run(go())):
        with pytest.raises(ServerError) as caught:
            call()
        errors.append(caught.value)
    return errors


GOOD_EXIT = {"layer": 1, "num_layers": 3, "reason": "threshold"}
ROW = {"label": "good", "probs": [1.0], "exit": GOOD_EXIT}


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (response(b"<html>bad gateway", 502), 502, "HTTP 502: <html>"),
        (response(b"[" * 100_000, 503), 503, r"HTTP 503: \[\["),
        (response(b'{"error": 3}', 500), 500, "HTTP 500"),
        (response(b"{", retry_after="1"), 200, "malformed answer .*JSONDecodeError"),
        (response(b"[" * 100_000), 200, "malformed answer .*RecursionError"),
        (response(b"\xff"), 200, "malformed answer"),
        (response(b"{}"), 200, "malformed answer .*KeyError: 'data'"),
        (response(b'{"data": [[]], "model": "m"}'), 200, "malformed answer"),
        (response(b'{"data": [], "model": "m", "usage": {"total_tokens": 1}}'), 200, "0 rows for 1 texts"),
        (response(b"x", content_encoding="br"), 200, "the Content-Encoding is br"),
        (response(b"xx", content_encoding="gzip"), 200, "not gzip"),
        (response(gzip.compress(b"x" * 99)[:20], content_encoding="gzip"), 200, "incomplete gzip"),
        (response(gzip.compress(bytes(2**26 + 1)), content_encoding="gzip"), 200, "more than 67108864 bytes"),
        (response(gzip.compress(bytes(2**26 + 1)), 500, content_encoding="gzip"), 500, "more than 67108864"),
    ],
    ids=lambda value: "sent" if isinstance(value, bytes) else None,
)
def test_a_malformed_answer_is_a_server_error(sent: bytes, status: int, says: str) -> None:
    with answering(sent) as url:
        for error in both(url):
            assert isinstance(error, ServerError) and re.search(says, str(error)), error
            assert (error.status, error.retry_after_s) == (status, None)


def test_an_answer_may_be_compressed() -> None:
    whole = {"data": [ROW], "model": "m:1", "usage": {"total_tokens": 3}}
    sent = response(gzip.compress(json.dumps(whole).encode()), content_encoding="gzip")
    with answering(sent) as url:
        assert Client(url).classify("good").raw == whole
        with pytest.raises(ServerError, match="more than 20 bytes"):
            Client(url, max_answer_bytes=20).classify("good")


@pytest.mark.parametrize("after", ["\xb2", "9" * 400, "-1", "1e3", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_a_retry_after_that_is_not_a_number_of_seconds_is_ignored(after: str) -> None:
    with answering(response(b"busy", 503, retry_after=after)) as url:
        for error in both(url):
            assert isinstance(error, ServerError) and error.retry_after_s is None


@pytest.mark.parametrize("head", [True, False])
def test_the_time_of_an_answer_is_limited_in_total(head: bool) -> None:
    """Each byte arrives within the time-out, but the whole answer does not."""
    sent = response(b"x" * 1000)
    parts = [sent[:-1000], *[b"x"] * 1000] if head else [bytes([byte]) for byte in sent]
    with answering(*parts, pause_s=0.05) as url:
        started = time.monotonic()
        for error in both(url, timeout_s=1.0):
            assert isinstance(error, ServerError) and "incomplete within 1 s" in str(error)
            assert error.status == (200 if head else 0)
        assert time.monotonic() - started < 20


def test_the_command_classifies_texts(server: Server) -> None:
    output = de3(["classify", "a good film", "a dull plot", "--tau", "0", "--url", server.url])
    assert [line.split("  ")[0] for line in output.splitlines()] == [
        row["label"] for row in server.classify(input=["a good film", "a dull plot"], tau=0).json()["data"]
    ]
    assert "layer 3" in output
    output = de3(["classify", "a good film " * 60, "--tau", "0", "--long", "windows", "--url", server.url])
    with Client(server.url) as client:
        (row,) = client.classify("a good film " * 60, tau=0, long="windows").rows
    assert row.raw["windows"]["of"] > 1 and f"{row.label}  {max(row.probs):.3f}  layer 3" in output


def test_the_command_sends_long_texts_in_small_batches(server: Server, tmp_path: Path) -> None:
    file, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    file.write_text(("good " * 20_000 + "\n") * 32)  # 3.2 MB; the server takes 1 MiB
    de3(f"classify --file {file} --out {out} --url {server.url}")
    assert out.read_text().count("\n") == 32


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("in.txt", "a good film\n\na dull plot\n", ()),
        ("in.csv", 'text;who\n"a good; film";7\na dull plot;8\n', ("--delimiter", ";")),
        ("in.tsv", "a good film\ta dull plot\n", ("--no-header", "--text-column", "0", "--pair-column", "1")),
    ],
)
def test_the_command_reads_tables(
    server: Server, tmp_path: Path, name: str, content: str, options: tuple[str, ...]
) -> None:
    file, out = tmp_path / name, tmp_path / "out.jsonl"
    file.write_text(content)
    de3(["classify", "--file", str(file), "--out", str(out), "--url", server.url, "--tau", "0", *options])
    inputs: Any = {
        "in.txt": ["a good film", "a dull plot"],
        "in.csv": ["a good; film", "a dull plot"],
        "in.tsv": {"text": "a good film", "text_pair": "a dull plot"},
    }[name]
    expected = server.classify(input=inputs, tau=0).json()["data"]
    assert [json.loads(line)["probs"] for line in out.read_text().splitlines()] == [
        row["probs"] for row in expected
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--file", "x.jsonl"), "give texts, or --file and --out"),
        ((), "give texts"),
        (("good", "--url", "localhost:8000"), "did you mean http://localhost:8000"),
        (("good", "--url", "http://127.0.0.1:9"), "start it with de3 serve, or give its address with --url"),
        (("good", "--url", "http://[x"), "no answer from the server"),
        (("good", "--tau", "7"), "the server answers 422: tau: "),
        (("good film " * 60, "--long", "error"), "has 122 tokens, the model takes at most 64"),
    ],
)
def test_errors_of_the_command_say_what_is_wrong(
    server: Server, arguments: tuple[str, ...], says: str
) -> None:
    if "--url" not in arguments:
        arguments = (*arguments, "--url", server.url)
    result = invoke(["classify", *arguments])
    assert result.exit_code == 1 and says in str(result.exception)
