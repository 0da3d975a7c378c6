"""A fuzzer that sends malformed requests; the server must answer with a clear error or close the connection.

Requests are valid ones with mutations of JSON values, JSON bytes, headers or the request line. An answer must be HTTP
with a status below 500 (or 503 or 504), and an error must have the documented shape. Every well-formed request must be
answered, and at the end a valid request must get the same answer as at the start.
"""

import json
import random
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from de3.runtime.classification import ClassifyRequest
from de3.runtime.fields import known_fields

TIMEOUT_S = 60.0
FIRST_BYTE_S = 0.3  # wait for the answer to a request that may be incomplete, before the client half-closes
MAX_PROBLEMS = 20  # recorded examples

# Values that parsers often mishandle.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400, 1e-320),
    *("", " ", "\x00", "a\x00b", "\ud800", "\ufeff", "é" * 300, "😀" * 50, "\u202e", "%s%n"),
    *("../../etc/passwd", "{{7*7}}", "'; DROP TABLE x; --", "a" * 5000),
    *("中" * 3000, " " * 2000, "[SEP] [CLS] [PAD]", "NaN", "1"),
    *([], [[]], [[[]]], {}, {"text": ""}),
    *({"text": "a", "text_pair": None}, {"text": 1}, ["a"] * 300, [None]),
    *({"text": "a", "text_pair": "b", "more": 1}, ["a", ""], ["a", {"text": "b"}], [["a"]]),
)
FIELDS = (
    *known_fields(ClassifyRequest),
    *("query", "documents", "texts", "top_n", "instances", "contents", "detector_params"),
    *("queries", "items", "text_1", "text_2", "data_1", "additional_provider_specific_params", "label"),
    *("unknown", "__proto__", ""),
)
GOOD = (
    {"input": "a warm , funny , engaging film"},
    {"input": ["good", "bad"], "tau": 0.3},
    {"input": {"text": "good", "text_pair": "bad"}, "explain": True},
    {"input": "good", "latency_budget_ms": 50, "best_effort": True, "ood": True},
    {"input": ["one", "two", "three"], "lambda": 2, "tau": 0.1, "max_layer": 3},
    {"input": "good", "target_speedup": 2},
    {"input": "good film " * 400, "long": "windows"},
    {"input": "good film " * 400, "long": "windows", "flag": "negative", "flag_threshold": 0.9},
    {"query": "good", "documents": ["a film", "bad"], "top_n": 1},
    {"instances": ["good", "bad"], "parameters": {"tau": 0.1}},
    {"contents": ["good"], "detector_params": {"threshold": 0.5}},
    {"texts": ["good", ""], "additional_provider_specific_params": {"label": "positive", "threshold": 0.5}},
    {"input": [{"type": "text", "text": "good"}]},
    {"text_1": "good", "text_2": ["bad", "a film"]},
)
PATHS = (
    *("/", "/classify/", "/v1/classify", "/v1/models", "/v1/models/x/calibration", "/metrics", "/docs"),
    *("/health", "/%00", "/classify?x=1", "/..//../etc/passwd", "/v1/models/%2e%2e/calibration"),
    *("/" + "a" * 3000, "*", "//", "/v1/models/sst2/load", "/openapi.json", "/ready"),
    *("/predict", "/v2/models/sst2/infer", "/v2/models/a%00b/versions/9/infer", "/info", "/v2"),
    *("http://other/classify", "/classify#x", "/cl\xe4ssify"),
    *(
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
        "/v1/models/sst2:predict",
        "/v1/models/:predict",
        "/api/v1/text/contents",
        "/beta/litellm_basic_guardrail_api",
        "/v1/moderations",
        "/v1/decisions",
        "/v1/systemone",
        "/score",
    ),
)
STANDARD = ("POST", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH")
METHODS = (*STANDARD, "TRACE", "CONNECT", "post", "BREW", "P" * 40)
HEADERS = (
    *("Content-Type: text/plain", "Content-Type: application/xml; charset=\x80", "Expect: 100-continue"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked"),
    *("Content-Length: -1", "Content-Length: 0", "Content-Length: 99999999999999999999"),
    *("Content-Length: 5\r\nContent-Length: 6", "X: " + "y" * 40_000, "X-Request-ID: \x01\x02"),
    *("X-Request-ID: " + "a" * 500, "traceparent: 00-zz-zz-zz", "Authorization: Bearer"),
    *("Authorization: Bearer \xff\xfe", "Connection: close", "Connection: upgrade\r\nUpgrade: websocket"),
    *("nocolon", ": empty", " folded: x", "Host:", "Content-Encoding: gzip", "Accept: */*;q=\x00"),
    *("Cookie: " + "a=b;" * 900, "detector-id: sst2", "detector-id: \xff"),
)

FRAGMENTS = (b"\x00", b"\xff\xfe", b'"', b"{", b"\\u", b"1e999", b"NaN", b"\r\n")
# Larger bodies are refused by their length, possibly before they are sent.
MAX_BODY_BYTES = 2**20


@dataclass
class Result:
    """The result of a fuzz test.

    Attributes:
        statuses: number of answers by status; "closed": the connection was closed without an answer.
        problems: descriptions of wrong answers, each with its request.
        count: number of requests.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, bytes]] = field(default_factory=list)
    count: int = 0

    def problem(self, message: str, request: bytes) -> None:
        """Record a problem, unless MAX_PROBLEMS are recorded already."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((message, request[:2000]))


@dataclass(frozen=True)
class RawRequest:
    """The bytes of a request; is_http: they are well-formed HTTP, so the server must answer."""

    data: bytes
    is_http: bool = True


def make(rng: random.Random, host: str) -> RawRequest:
    """A random request with one or a few errors, rarely with none."""
    body = _body(rng)
    is_http = len(body) < MAX_BODY_BYTES
    method, path, headers = "POST", "/classify", ["Content-Type: application/json"]
    if rng.random() < 0.15:
        method = rng.choice(METHODS)
        is_http = is_http and method in STANDARD
    if rng.random() < 0.15:
        path = rng.choice(PATHS)
        is_http = is_http and path.isascii()
    length = len(body)
    if rng.random() < 0.03:
        is_http = False
        length = max(0, length + rng.choice((-5, -1, 1, 20)))
    headers.append(f"Content-Length: {length}")
    if rng.random() < 0.15:
        is_http = False
        headers.insert(rng.randrange(len(headers) + 1), rng.choice(HEADERS))
    if rng.random() < 0.02:
        is_http = False
        headers = [h for h in headers if not h.startswith("Content-Length")]
    head = "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]).encode("latin-1")
    if rng.random() < 0.03:
        is_http = False
        head = _mutate(rng, head)
    return RawRequest(head + body, is_http)


def _body(rng: random.Random) -> bytes:
    value: Any = json.loads(json.dumps(rng.choice(GOOD)))
    kind = rng.random()
    if kind < 0.1:
        value = rng.choice(STRANGE)
    elif kind < 0.7:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            value[rng.choice(FIELDS)] = rng.choice(STRANGE)
        if rng.random() < 0.1:
            value.pop("input", None)
    body = json.dumps(value).encode("utf-8", "surrogatepass")
    if 0.7 <= kind < 0.9:
        body = _mutate(rng, body)
    elif kind > 0.98:
        depth = rng.choice((10, 1000, 20_000))
        body = b'{"input":' + b"[" * depth + b"]" * rng.choice((0, depth)) + b"}"
    elif kind > 0.97:
        body = rng.randbytes(rng.choice((0, 1, 100, 5000)))
    elif kind > 0.965:
        body = b'{"input":"' + b"a" * rng.choice((2**20, 2**21)) + b'"}'
    return body


def _mutate(rng: random.Random, data: bytes) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not mutated:
            break
        i = rng.randrange(len(mutated))
        match rng.randrange(4):
            case 0:
                mutated[i] = rng.randrange(256)
            case 1:
                del mutated[i : i + rng.choice((1, 3, 20))]
            case 2:
                mutated[i:i] = rng.choice(FRAGMENTS)
            case _:
                mutated[i:i] = mutated[i : i + 30]
    return bytes(mutated)


def check(status: int, headers: dict[str, str], body: bytes, request: bytes) -> str:
    """The problem with an answer; empty if it is correct. headers: by name in lower case."""
    if status in (503, 504):
        return "" if status == 504 or "retry-after" in headers else "503 without Retry-After"
    if status >= 500:
        return f"status {status}"
    if status >= 400 and not request.startswith(b"HEAD "):
        try:
            answer = json.loads(body)
            if (detail := answer.get("detail")) is not None:  # System One's
                answer = {"error": detail[0]["msg"] if isinstance(detail, list) else detail["message"]}
            is_of_detectors = answer.keys() == {"code", "message"} and answer["code"] == status
            error = answer["message" if is_of_detectors else "error"]
            if isinstance(error, str) and error:  # the error shape of other protocols
                return ""
            if not (error["message"] and error["type"] and error["code"] == status):
                return f"an error without message, type or the right code: {body[:300]!r}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"status {status} with the wrong shape: {body[:300]!r}"
    return ""


def fuzz(url: str, requests: int, seed: int, on_progress: Callable[[int], None] = lambda _: None) -> Result:
    """Send requests one after the other; raises OSError if the server stops listening.

    A connection is reused only after a well-formed request and a 200 that keeps it open: leftovers of other requests
    would affect the next.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    rng, result = random.Random(seed), Result()
    before = _answer(url)
    connection, used = socket.create_connection(address, TIMEOUT_S), time.monotonic()
    for number in range(requests):
        request = make(rng, parts.netloc)
        result.count += 1
        idle_s = time.monotonic() - used
        if not send(connection, request, result, idle_s):
            connection.close()
            connection = socket.create_connection(address, TIMEOUT_S)
        used = time.monotonic()
        on_progress(number + 1)
    connection.close()
    if (after := _answer(url)) != before:
        result.problem(f"a valid request was answered {before!r} before the test, {after!r} after it", b"")
    return result


def _answer(url: str) -> Any:
    """The answer to a valid request."""
    body = json.dumps(GOOD[0] | {"explain": True}).encode()
    with urlopen(Request(url + "/classify", body), timeout=TIMEOUT_S) as answer:
        return json.load(answer)["data"]


def send(connection: socket.socket, raw: RawRequest, result: Result, idle_s: float = 0.0) -> bool:
    """Send a request and record its result; returns True if the connection can be reused.

    idle_s: seconds since the connection was last used, for the message if the server closed it.
    """
    request = raw.data
    try:
        connection.sendall(request)
        if not raw.is_http and not select.select([connection], [], [], FIRST_BYTE_S)[0]:
            connection.shutdown(socket.SHUT_WR)  # the server is slow, or waits for more data
        answer = HTTPResponse(connection, method=request.split(b" ", 1)[0].decode("latin-1"))
        answer.begin()
        body = answer.read()
    except TimeoutError:
        result.problem(f"neither answered nor closed within {TIMEOUT_S:g} s", request)
        return False
    except (OSError, HTTPException) as error:
        result.statuses["closed"] += 1
        if raw.is_http:
            result.problem(f"no answer to a well-formed request, after {idle_s:.1f} s: {error!r}", request)
        return False
    result.statuses[str(answer.status)] += 1
    headers = {name.lower(): value for name, value in answer.getheaders()}
    if problem := check(answer.status, headers, body, request):
        result.problem(problem, request)
    # The server may refuse a request without reading all of it, and answer a malformed one before its last bytes.
    return raw.is_http and answer.status == 200 and not answer.will_close
