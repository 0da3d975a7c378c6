"""A service as an upstream, in a thread of the test, and the .toml file of a model that uses it."""

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from de3.export.upstream import artifact_of
from de3.model_store.store import Store
from de3.runtime.upstream_settings import UpstreamModel, read_upstream
from de3.server.service import Service as Serving
from de3.server.settings import Settings
from tests.fixtures import BAD, GOOD
from tests.serving import Server, running

KEY = "sk-a-secret-that-appears-nowhere"
# Another order than that of tiny, which does not know one of them.
LABELS = ["positive", "mixed", "negative"]
MARK = "Text: "  # precedes the text in PROMPT
PROMPT = "Which of {labels} is it?\n" + MARK + "{text}"


def opinion(text: str) -> str:
    """The label that make_rows gives to a text."""
    words = text.split()
    for i, word in enumerate(words):
        if word in GOOD or word in BAD:
            return "negative" if (word in GOOD) == (i == 0 or words[i - 1] != "not") else "positive"
    return "mixed"


def toml_of(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml_of(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def write_toml(path: Path, upstream: dict[str, Any], **fields: Any) -> Path:
    """Write the file of a model, without the fields that are None; returns its path."""
    lines = [f"{name} = {toml_of(value)}" for name, value in fields.items() if value is not None]
    lines += ["[upstream]"]
    lines += [f"{name} = {toml_of(value)}" for name, value in upstream.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


def chat(url: str = "https://llm.internal/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    """The fields of an upstream of the kind chat."""
    return {"kind": "chat", "url": url, "model": "some-model", "prompt": PROMPT, **fields}


def model_of(folder: Path, labels: list[str], upstream: dict[str, Any], **fields: Any) -> UpstreamModel:
    """A model with an upstream, from the file NAME.toml in this folder."""
    fields = {"name": "tickets", "encoder": "tiny", "labels": labels, **fields}
    return read_upstream(write_toml(folder / f"{fields['name']}.toml", upstream, **fields))


class Service:
    """An OpenAI-compatible chat service, and /classify, on a real socket.

    Attributes:
        answer: returns the reply to a text; may raise or block.
        respond: writes the response to a request, given the handler and its parsed body; None: the answer, as JSON.
        requests: the bodies of all requests; headers: their headers.
        is_broken: answer with 503.
        gate: no response is sent while it is clear.
        running, most: number of requests in progress, now and at most.
    """

    def __init__(self, answer: Callable[[str], str], port: int = 0, certificate: Path | None = None) -> None:
        self.answer = answer
        self.respond: Callable[[BaseHTTPRequestHandler, dict[str, Any]], None] | None = None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.is_broken, self.gate = False, threading.Event()
        self.running = self.most = 0
        self._lock = threading.Lock()
        self.gate.set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with suppress(ConnectionError, ssl.SSLError):
                    service._handle(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            request_queue_size = 1024

            def handle_error(self, *_: Any) -> None:
                """The client may have gone."""

        self._server = Listening(("127.0.0.1", port), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def _handle(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            self.running += 1
            self.most = max(self.most, self.running)
        response: Any = None
        try:
            self.gate.wait(60)
            if self.respond is not None:
                self.respond(handler, body)
            elif self.is_broken:
                response = {"error": "overloaded"}, 503
            else:
                response = reply(self.answer(text_of(body))), 200
        finally:
            with self._lock:
                self.running -= 1
        if response is not None:  # only now, as the next call may arrive at once
            send(handler, *response)

    @property
    def texts(self) -> list[str]:
        """The texts of all requests."""
        return [text_of(body) for body in list(self.requests)]

    def stop(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


def text_of(body: dict[str, Any]) -> str:
    """The text in a request."""
    if "input" in body:
        given = body["input"]
        return given if isinstance(given, str) else given["text"]
    return str(body["messages"][0]["content"]).split(MARK, 1)[-1]


def reply(content: str | None, **message: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}}
    return {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


def send(handler: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
    """Send a response: JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@contextmanager
def service(
    answer: Callable[[str], str] = lambda _: "negative", port: int = 0, certificate: Path | None = None
) -> Iterator[Service]:
    """A running service. certificate: a file with a certificate and its key; None: no TLS."""
    running = Service(answer, port, certificate)
    try:
        yield running
    finally:
        running.stop()


@contextmanager
def served(folder: Path, store: Path, *upstreams: Any, **settings: Any) -> Iterator[Server]:
    """A server of models with upstreams, in one process; upstreams: see model_of."""
    (folder / "cache").mkdir(exist_ok=True)
    artifacts = [
        artifact_of(of, folder / f"{of.name}.toml", Store(store), "fp32", folder / "cache")
        for of in upstreams
    ]
    known = Settings(store=store, port=0, threads=2, upstreams=upstreams, **settings)
    with running(Serving(known, artifacts)) as server:
        yield server
