"""A client of a running server, blocking or asynchronous.

    from de3.client import Client

    with Client("http://localhost:8000") as client:
        answer = client.classify(["a fine film", "a dull one"], tau=0.1)
        print([(row.label, row.exit.layer) for row in answer.rows])

A request that is shed or rate-limited is retried, after the server's Retry-After.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import httpx

URL = "http://127.0.0.1:8000"
RETRIED = (429, 503)
MAX_PAUSE_S = 30.0
Input = str | dict[str, str] | tuple[str, str]


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
        """An exit from its JSON, in which λ is `lambda`; unknown fields, as from a newer server, are ignored."""
        known: dict[str, Any] = {field.name: json.get(field.name) for field in fields(cls)}
        return cls(**{**known, "lam": json.get("lambda")})


@dataclass(frozen=True, slots=True)
class Row:
    """The answer to one text.

    Attributes:
        probs: probability of each label, in the model's order; empty for a regression model.
        raw: the JSON of the answer, with the fields that `explain` and `ood` add.
        value: the answer of a regression model; None for a model with classes.
    """

    label: str
    probs: list[float]
    exit: Exit
    is_truncated: bool
    raw: dict[str, Any]
    value: float | None = None

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Row":
        """A row from its JSON."""
        truncated, value = json.get("truncated", False), json.get("value")
        return cls(json["label"], json["probs"] or [], Exit.parse(json["exit"]), truncated, json, value)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: a row for each text, in order.

    Attributes:
        model: name:version.
        tokens: number of tokens, over all texts.
        raw: the JSON of the response.
    """

    model: str
    rows: list[Row]
    tokens: int
    raw: dict[str, Any]

    @classmethod
    def parse(cls, json: dict[str, Any]) -> "Answer":
        """An answer from the JSON of a response."""
        rows = [Row.parse(row) for row in json["data"]]
        return cls(json["model"], rows, json["usage"]["total_tokens"], json)


class ServerError(Exception):
    """A request that the server refused or failed to answer.

    Attributes:
        status: the HTTP status.
        field: the invalid field, if any.
        retry_after_s: seconds after which the same request may succeed; None: a retry will not help.
    """

    def __init__(self, status: int, message: str, field: str | None, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after_s = status, message, field, retry_after_s


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _body(inputs: Input | Sequence[Input], options: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a request; a tuple is a pair. `lam` is sent as lambda."""

    def one(text: Input) -> Any:
        return {"text": text[0], "text_pair": text[1]} if isinstance(text, tuple) else text

    is_batch = isinstance(inputs, Sequence) and not isinstance(inputs, str | tuple)
    given = {("lambda" if k == "lam" else k): v for k, v in options.items() if v is not None}
    return {"input": [one(text) for text in inputs] if is_batch else one(inputs), **given}  # type: ignore[arg-type]


def _checked(response: httpx.Response) -> Any:
    """The JSON of a response; raises ServerError."""
    if response.status_code == 200:
        return response.json()
    try:
        error = response.json()["error"]
        message, field = error["message"], error["param"]
    except (ValueError, KeyError, TypeError):  # the response of a proxy
        message, field = f"HTTP {response.status_code}: {response.text[:200]}", None
    after = response.headers.get("retry-after", "")
    raise ServerError(response.status_code, message, field, float(after) if after.isdigit() else None)


class _Attempts:
    """The attempts at one request, which is retried after some errors."""

    def __init__(self, retries: int) -> None:
        self._left, self._pause_s = retries, 0.1
        self.pause_s = 0.0  # before the next attempt

    def answer(self, response: httpx.Response) -> Answer | None:
        """The answer; None: retry after `pause_s`. Raises ServerError.

        The pause is the server's Retry-After or twice the last pause, whichever is longer, plus random jitter, so that
        clients that were refused together do not retry together. Without Retry-After a retry would fail again.
        """
        try:
            return Answer.parse(_checked(response))
        except ServerError as error:
            if self._left <= 0 or error.status not in RETRIED or error.retry_after_s is None:
                raise
            pause_s = max(error.retry_after_s, self._pause_s) * random.uniform(1.0, 1.5)
            self.pause_s = min(MAX_PAUSE_S, pause_s)
            self._left, self._pause_s = self._left - 1, 2 * self._pause_s
            return None


class Client:
    """A blocking client; threads may share it.

    `classify` takes the request's fields of docs/api.md as keywords: model, tau, signal, lam, max_layer,
    target_speedup, latency_budget_ms, max_disagreement, best_effort, thresholds, truncate, long, explain, ood, raw,
    top_k, request_id.
    """

    def __init__(
        self, url: str = URL, key: str | None = None, *, timeout_s: float = 60.0, retries: int = 4
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=timeout_s)

    def classify(self, inputs: Input | Sequence[Input], **options: Any) -> Answer:
        """Classify a text, a pair or a batch; raises ServerError, or httpx.TransportError."""
        body, attempts = _body(inputs, options), _Attempts(self._retries)
        while (answer := attempts.answer(self._http.post("/classify", json=body))) is None:
            time.sleep(attempts.pause_s)
        return answer

    def models(self) -> list[dict[str, Any]]:
        """The served models; raises ServerError."""
        return list(_checked(self._http.get("/v1/models"))["data"])

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same client for asyncio."""

    def __init__(
        self, url: str = URL, key: str | None = None, *, timeout_s: float = 60.0, retries: int = 4
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout_s)

    async def classify(self, inputs: Input | Sequence[Input], **options: Any) -> Answer:
        """Classify a text, a pair or a batch; raises ServerError, or httpx.TransportError."""
        body, attempts = _body(inputs, options), _Attempts(self._retries)
        while (answer := attempts.answer(await self._http.post("/classify", json=body))) is None:
            await asyncio.sleep(attempts.pause_s)
        return answer

    async def models(self) -> list[dict[str, Any]]:
        """The served models; raises ServerError."""
        return list(_checked(await self._http.get("/v1/models"))["data"])

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
