"""Clients of a running server, blocking and asynchronous.

    from de3.client import Client

    with Client("http://localhost:8000") as client:
        answer = client.classify(["a fine film", "a dull one"], tau=0.1)
        print([(row.label, row.exit.layer) for row in answer.rows])

`classify` retries a request that is shed or rate-limited, after the delay in the server's Retry-After (at most 30 s).
If there are more texts than the server's limits allow, it sends them in several requests, one after the other.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, Self, TypedDict, TypeVar

import httpx

from de3.response_limits import Body, time_limit, trace

URL = "http://127.0.0.1:8000"
RETRIED = (429, 503)
MAX_PAUSE_S = 30.0
MAX_ANSWER_BYTES = 2**26  # an answer to 64 texts with 10,000 labels takes 14 MB
MAX_TEXTS, MAX_BODY_BYTES = 256, 2**20  # a server's default limits on one request
SECONDS = re.compile("[0-9]{1,9}")
Input = str | dict[str, str] | tuple[str, str]


class Options(TypedDict, total=False):
    """The options of `/classify` (docs/api.md); `lam` is its `lambda`."""

    tau: float
    signal: str
    lam: float
    max_layer: int
    target_speedup: float
    latency_budget_ms: float
    max_disagreement: float
    max_missed: float
    best_effort: bool
    thresholds: float | Mapping[str, float]
    truncate: bool
    long: Literal["truncate", "windows", "error"]
    flag: str
    flag_threshold: float
    explain: bool
    ood: bool
    raw: bool
    top_k: int
    aggregation: Literal["none", "simple", "first", "average", "max"]
    labels: Sequence[str]
    min_score: float | Mapping[str, float]
    redact: bool | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Exit:
    """The exit of a text: the fields of `exit` in docs/api.md."""

    layer: int
    num_layers: int
    reason: str
    tau: float
    signal: str
    lam: float | None
    score: float | None
    entropy: float | None
    distance_ratio: float | None
    edr: float | None

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Exit":
        """An exit from its JSON, where λ is `lambda`. Unknown fields, such as those of newer servers, are ignored."""
        known: dict[str, Any] = {field.name: json.get(field.name) for field in fields(cls)}
        return cls(**{**known, "lam": json.get("lambda")})


@dataclass(frozen=True, slots=True)
class Span:
    """A labelled part of a text: the characters [start, end), in code points.

    Attributes:
        text: these characters; None if the request sets `redact`.
    """

    start: int
    end: int
    label: str
    score: float
    text: str | None = None

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Span":
        """A span from its JSON."""
        return cls(json["start"], json["end"], json["label"], json["score"], json.get("text"))


@dataclass(frozen=True, slots=True)
class Row:
    """The answer to one text.

    Attributes:
        label: the most probable label; for a regression model, the name of its output; empty for a token classifier.
        probs: probability of each label (if the request sets `raw`, its logit), in the model's order; empty for a
            regression model and a token classifier.
        truncated: the text was truncated.
        raw: the JSON of the answer; some options add fields, such as `flag` and `top`.
        value: the answer of a regression model; None for a model with classes.
        labels: the labels that a multi-label model assigns; None for other models.
        spans: the spans that a token classifier finds, in order; None for other models.
        text: if the request sets `redact`, the text with its spans replaced; None otherwise.
    """

    label: str
    probs: list[float]
    exit: Exit
    truncated: bool
    raw: dict[str, Any]
    value: float | None = None
    labels: list[str] | None = None
    spans: list[Span] | None = None
    text: str | None = None

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Row":
        """A row from its JSON."""
        exit_, truncated = Exit.parse(json["exit"]), json.get("truncated", False)
        if "spans" in json:
            spans = [Span.parse(span) for span in json["spans"]]
            return cls("", [], exit_, truncated, json, spans=spans, text=json.get("text"))
        label, probs = json["label"], json["probs"] or []
        return cls(label, probs, exit_, truncated, json, json.get("value"), json.get("labels"))


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a model to a request: a row for each text, in order.

    Attributes:
        model: name:version.
        tokens: number of tokens, over all texts; the same for all models that answer on one pass.
        raw: the JSON of the response; if several models answer, the part that one model would have sent alone.
    """

    model: str
    rows: list[Row]
    tokens: int
    raw: dict[str, Any]

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Answer":
        """An answer from the JSON of a response."""
        rows = [Row.parse(row) for row in json["data"]]
        return cls(json["model"], rows, int(json["usage"]["total_tokens"]), json)


class ServerError(Exception):
    """A request that the server refused or did not answer, or whose response is unusable.

    Attributes:
        status: the HTTP status; 200 if the answer is malformed, too large or incomplete; 0 if no response arrived.
        field: the invalid field; None: no field is named.
        retry_after_s: seconds after which the same request may succeed, from Retry-After; None: the response has none.
    """

    def __init__(self, status: int, message: str, field: str | None, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after_s = status, message, field, retry_after_s


def _headers(key: str | None) -> dict[str, str]:
    return {"Accept-Encoding": "gzip", **({"Authorization": f"Bearer {key}"} if key else {})}


def _bodies(
    inputs: Input | Sequence[Input], options: dict[str, Any], max_texts: int
) -> list[tuple[int, dict[str, Any]]]:
    """The JSON of each request of a call, with the index of its first text.

    Tuples become pairs of texts; options that are None are omitted. Raises ValueError for an input that is not text, or
    that UTF-8 cannot encode.
    """

    given = with_lambda({name: value for name, value in options.items() if value is not None})
    if isinstance(inputs, str | tuple) or not isinstance(inputs, Sequence):
        return [(0, {"input": _checked(inputs, "input"), **given})]
    texts = [_checked(text, f"input[{index}]") for index, text in enumerate(inputs)]
    room = MAX_BODY_BYTES - _json_bytes({"input": [], **given})
    parts = batches([_json_bytes(text) + 1 for text in texts], max_texts, room) if texts else [slice(0)]
    return [(part.start or 0, {"input": texts[part], **given}) for part in parts]


def with_lambda(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the name of λ in JSON, `lambda`, instead of that of a keyword, `lam`."""
    return {"lambda" if name == "lam" else name: value for name, value in options.items()}


def _several(models: Sequence[str | Mapping[str, Any]]) -> list[Any]:
    """The field `models` of a request."""
    return [one if isinstance(one, str) else with_lambda(one) for one in models]


def _checked(text: Any, where: str) -> Any:
    """The JSON of a text or pair; raises ValueError, whose message begins with `where`."""
    if isinstance(text, tuple) and len(text) == 2:
        text = {"text": text[0], "text_pair": text[1]}
    for part in text.values() if isinstance(text, dict) else [text]:
        if not isinstance(part, str):
            raise ValueError(f"{where}: must be a text or a pair of texts, got {part!r:.50}")
        try:
            part.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: has half of a surrogate pair, which is not a character") from None
    return text


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False).encode())


def batches(sizes: Sequence[int], most: int, most_size: int) -> Iterator[slice]:
    """Yield consecutive batches: at most `most` items each, of total size at most `most_size`.

    A single item larger than that is a batch of its own.
    """
    start = total = 0
    for end, size in enumerate(sizes):
        if end > start and (end - start == most or total + size > most_size):
            yield slice(start, end)
            start, total = end, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


@dataclass(frozen=True, slots=True)
class _Received:
    """A response: its status, Retry-After and decompressed body."""

    status: int
    retry_after: str
    body: bytes

    @classmethod
    def whole(cls, response: httpx.Response, body: Body) -> "_Received":
        """A response whose body has been received; raises ValueError if the body is incomplete."""
        return cls(response.status_code, response.headers.get("retry-after", ""), body.whole())


def _no_answer(received: Sequence[httpx.Response], reason: object) -> ServerError:
    """The error for a response that did not arrive completely. received: empty if not even its headers arrived."""
    if received:
        return ServerError(received[0].status_code, f"the answer cannot be used: {reason}", None, None)
    return ServerError(0, f"no answer from the server: {reason}", None, None)


T = TypeVar("T")


def _parsed(received: _Received, parse: Callable[[Any], T]) -> T:
    """The result of `parse` for a response's JSON; raises ServerError for a refusal or a malformed answer."""
    status, body = received.status, received.body
    if status == 200:
        try:
            return parse(json.loads(body))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            reason = f"malformed answer ({type(error).__name__}: {error!s:.100}): {_start_of(body)}"
            raise ServerError(status, reason, None, None) from None
    try:
        refusal = json.loads(body)["error"]
        message, field = str(refusal["message"]), refusal["param"]
    except (ValueError, KeyError, TypeError, RecursionError):  # may be a proxy's response
        message, field = f"HTTP {status}: {_start_of(body)}", None
    after = received.retry_after
    raise ServerError(status, message, field, float(after) if SECONDS.fullmatch(after) else None)


def _start_of(body: bytes) -> str:
    return body[:200].decode(errors="replace")


class _Attempts:
    """The attempts at one request, which is retried after some errors."""

    def __init__(self, retries: int, body: dict[str, Any], first: int | None) -> None:
        """first: index in the call of the request's first text; None: the request is the whole call."""
        self._left, self._pause_s, self._first = retries, 0.1, first
        self._texts = len(body["input"]) if isinstance(body["input"], list) else 1
        self._models = len(body.get("models", [""]))
        self.pause_s = 0.0  # before the next attempt

    def answers(self, received: _Received) -> list[Answer] | None:
        """The models' answers; None: retry after `pause_s` seconds. Raises ServerError if it should not be retried.

        The pause is the server's Retry-After or a backoff that doubles from 0.1 s, whichever is longer, plus jitter, so
        that clients refused together do not retry together; at most MAX_PAUSE_S. A response without Retry-After is not
        retried.
        """
        try:
            return _parsed(received, self._parse)
        except ServerError as error:
            if self._left <= 0 or error.status not in RETRIED or error.retry_after_s is None:
                raise self._in_call(error) from None
            pause_s = max(error.retry_after_s, self._pause_s) * random.uniform(1.0, 1.5)
            self.pause_s = min(MAX_PAUSE_S, pause_s)
            self._left, self._pause_s = self._left - 1, 2 * self._pause_s
            return None

    def _in_call(self, error: ServerError) -> ServerError:
        """The error, with the text's index in the call: input[3] of a later request may be input[259]."""
        if (first := self._first) is None:
            return error

        def renamed(name: str) -> str:
            match = re.match(r"input\b(?:\[([0-9]+)\])?", name)
            if match is None or (match[1] is None and self._texts > 1):
                return name
            return f"input[{first + int(match[1] or 0)}]{name[match.end() :]}"

        field = error.field and renamed(error.field)
        return ServerError(error.status, renamed(error.message), field, error.retry_after_s)

    def _parse(self, json: Any) -> list[Answer]:
        results = json.pop("results", [{}])
        answers = [Answer.parse({**json, **result}) for result in results]
        if len(answers) != self._models:
            raise ValueError(f"{len(answers)} results for {self._models} models")
        for answer in answers:
            if len(answer.rows) != self._texts:
                raise ValueError(f"{len(answer.rows)} rows for {self._texts} texts")
        return answers


def _combined(answers: Sequence[Answer]) -> Answer:
    """A model's answer to a call, from those to its requests; raises ServerError if they are of several models."""
    if len(answers) == 1:
        return answers[0]
    if len(models := {answer.model for answer in answers}) > 1:
        names = ", ".join(sorted(models))
        raise ServerError(200, f"several models answered ({names}): give model as name:version", None, None)
    raw, tokens = dict(answers[0].raw), sum(answer.tokens for answer in answers)
    rows = (row.raw for answer in answers for row in answer.rows)
    raw["data"] = [{**row, "index": index} for index, row in enumerate(rows)]
    raw["usage"] = {**raw["usage"], "prompt_tokens": tokens, "total_tokens": tokens}
    if any(answer.raw.get("certificate") != raw.get("certificate") for answer in answers):
        raw.pop("certificate", None)
    return Answer.parse(raw)


def _models_in(json: Any) -> list[dict[str, Any]]:
    return list(json["data"])


Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


class _Client(Generic[Http]):
    """Settings and errors of the two clients."""

    _kind: type[Http]

    def __init__(
        self,
        url: str = URL,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 4,
        max_texts: int = MAX_TEXTS,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        """key: API key. timeout_s: limit on each attempt. max_answer_bytes: limit on an answer, decompressed.

        retries: maximum number of retries of each request if the server sheds or rate-limits it. max_texts: texts in
        one request, at most the server's --max-texts.
        """
        self._retries, self._timeout_s, self._max_bytes = retries, timeout_s, max_answer_bytes
        self._max_texts = max_texts
        self._http: Http = self._kind(base_url=url, headers=_headers(key), timeout=timeout_s)

    @contextmanager
    def _errors(self) -> Iterator[list[httpx.Response]]:
        """Turn errors into ServerError. Yields a list, to which the caller adds the response once headers arrive."""
        received: list[httpx.Response] = []
        try:
            yield received
        except (TimeoutError, httpx.ReadTimeout):
            raise _no_answer(received, f"incomplete within {self._timeout_s:g} s") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise _no_answer(received, error) from None
        except ValueError as error:
            if not received:
                raise
            raise _no_answer(received, error) from None


class Client(_Client[httpx.Client]):
    """A blocking client; threads may share it.

    Its methods take the fields of a request (docs/api.md) as keywords: those of `Options`, model and request_id.
    """

    _kind = httpx.Client

    def classify(self, inputs: Input | Sequence[Input], **options: Any) -> Answer:
        """Classify a text, a pair or a batch, in as many requests as it needs.

        Raises ServerError; or ValueError, before anything is sent, for an input that is not text, such as NaN.
        """
        (answer,) = self._classify(inputs, options)
        return answer

    def classify_several(
        self, inputs: Input | Sequence[Input], models: Sequence[str | Mapping[str, Any]], **options: Any
    ) -> list[Answer]:
        """Classify with several models, on one pass if they have the same encoder; returns each one's answer, in order.

        models: for each, its name, or an object with `model` and exit options. Raises as classify does.
        """
        return self._classify(inputs, {**options, "models": _several(models)})

    def _classify(self, inputs: Input | Sequence[Input], options: dict[str, Any]) -> list[Answer]:
        parts, bodies = list[list[Answer]](), _bodies(inputs, options, self._max_texts)
        for first, body in bodies:
            attempts = _Attempts(self._retries, body, first if len(bodies) > 1 else None)
            while (answers := attempts.answers(self._send("POST", "/classify", body))) is None:
                time.sleep(attempts.pause_s)
            parts.append(answers)
        return [_combined(answers) for answers in zip(*parts, strict=True)]

    def models(self) -> list[dict[str, Any]]:
        """The served models, as the rows of GET /v1/models; raises ServerError."""
        return _parsed(self._send("GET", "/v1/models"), _models_in)

    def _send(self, method: str, path: str, json: Any = None) -> _Received:
        with (
            self._errors() as received,
            time_limit(self._timeout_s),
            self._http.stream(method, path, json=json, extensions={"trace": trace}) as response,
        ):
            received.append(response)
            body = Body(response, self._max_bytes)
            for chunk in response.iter_raw():
                body.add(chunk)
            return _Received.whole(response, body)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Client[httpx.AsyncClient]):
    """The asyncio version of Client."""

    _kind = httpx.AsyncClient

    async def classify(self, inputs: Input | Sequence[Input], **options: Any) -> Answer:
        """Classify a text, a pair or a batch, in as many requests as it needs; raises as Client.classify does."""
        (answer,) = await self._classify(inputs, options)
        return answer

    async def classify_several(
        self, inputs: Input | Sequence[Input], models: Sequence[str | Mapping[str, Any]], **options: Any
    ) -> list[Answer]:
        """Classify with several models, on one pass if they have the same encoder; returns each one's answer, in order.

        models: for each, its name, or an object with `model` and exit options. Raises as Client.classify does.
        """
        return await self._classify(inputs, {**options, "models": _several(models)})

    async def _classify(self, inputs: Input | Sequence[Input], options: dict[str, Any]) -> list[Answer]:
        parts, bodies = list[list[Answer]](), _bodies(inputs, options, self._max_texts)
        for first, body in bodies:
            attempts = _Attempts(self._retries, body, first if len(bodies) > 1 else None)
            while (answers := attempts.answers(await self._send("POST", "/classify", body))) is None:
                await asyncio.sleep(attempts.pause_s)
            parts.append(answers)
        return [_combined(answers) for answers in zip(*parts, strict=True)]

    async def models(self) -> list[dict[str, Any]]:
        """The served models, as the rows of GET /v1/models; raises ServerError."""
        return _parsed(await self._send("GET", "/v1/models"), _models_in)

    async def _send(self, method: str, path: str, json: Any = None) -> _Received:
        with self._errors() as received:
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream(method, path, json=json) as response,
            ):
                received.append(response)
                body = Body(response, self._max_bytes)
                async for chunk in response.aiter_raw():
                    body.add(chunk)
                return _Received.whole(response, body)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
