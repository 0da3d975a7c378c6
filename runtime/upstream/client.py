"""One call of an upstream: the request, and the label in its response."""

import asyncio
import math
import os
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from time import time
from typing import Any, Literal, NamedTuple

import certifi
import httpcore
import httpx
import orjson

from de3.runtime.engine.request import Text
from de3.runtime.questions import Form, Option, Question, body_of, probabilities_in
from de3.runtime.upstream.labels import Labels
from de3.runtime.upstream_settings import PLACEHOLDER, UpstreamOf

MAX_RESPONSE_BYTES = 2**18  # parsing takes at most a few milliseconds of the event loop
# What is read at once is parsed without a break: 64 KiB, the default, in chunks of one byte take 60 ms. httpx has no
# option for it, so this holds for all of the process's asynchronous HTTP/1.1 clients.
httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = 2**12
CONNECT_S = 5.0  # limit on the time to connect
MAX_RETRY_AFTER_S = 3600.0
SUM_TOLERANCE = 1e-3  # largest error of the sum of probabilities
CHARS_PER_TOKEN = 4  # estimate of the tokens of a response without usage
MAX_TOKENS = 2**24  # a response that reports more tokens is not believed

# Why a call failed; a label of the metrics.
Failure = Literal[
    "connection", "timeout", "rate_limited", "server_error", "refused", "redirect", "invalid", "reply"
]


class CallError(Exception):
    """A call that failed.

    Attributes:
        why: the kind of failure.
        may_retry: another call may succeed.
        is_outage: the upstream does not work; otherwise, only this text failed.
        retry_after_s: as the upstream asks for; None: it does not.
        is_certain: an outage that no text can cause; other outages may be due to the text.
    """

    def __init__(
        self,
        why: Failure,
        message: str,
        may_retry: bool,
        is_outage: bool,
        retry_after_s: float | None = None,
        is_certain: bool = False,
    ) -> None:
        super().__init__(message)
        self.why, self.may_retry, self.is_outage = why, may_retry, is_outage
        self.retry_after_s, self.is_certain = retry_after_s, is_certain


class Reply(NamedTuple):
    """An upstream's answer.

    Attributes:
        label: number of the label.
        probs: probability of each label; None: not known.
        is_extracted: the label was found among other words.
        answers: of questions, the probabilities of each; None: it refuses to answer one.
    """

    label: int
    probs: list[float] | None = None
    is_extracted: bool = False
    answers: list[list[float] | None] | None = None


class Asked(NamedTuple):
    """Questions, and the state that they are about: any JSON."""

    state: Any
    questions: Sequence[Question]


@dataclass(slots=True)
class Usage:
    """Tokens that a call has used."""

    input: int = 0
    output: int = 0


class Client:
    """Calls an upstream, without retries."""

    def __init__(self, of: UpstreamOf, key: str | None) -> None:
        self._of, self._names, self._form = of, Labels(of.labels), of.upstream.form
        self._questions = [] if self._form is None else [_question(of)]
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            # On a connection that is used again, bytes after a response would answer the next text.
            "Connection": "close",
        }
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._headers = headers
        self._client: httpx.AsyncClient | None = None

    def _open(self) -> httpx.AsyncClient:
        """The HTTP client; created on the event loop that uses it."""
        if self._client is None:
            context = ssl.create_default_context()  # honours SSL_CERT_FILE, for private authorities
            context.load_verify_locations(certifi.where())
            self._client = httpx.AsyncClient(
                verify=context,
                trust_env=False,  # texts go to the URL only, not to a proxy from the environment
                follow_redirects=False,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none is kept
                timeout=httpx.Timeout(None, connect=CONNECT_S),
                limits=httpx.Limits(max_connections=None),
            )
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def call(
        self, text: Text, timeout_s: float, used: Callable[[Usage], None], asked: Asked | None = None
    ) -> Reply:
        """Classify a text, or have questions answered; raises CallError.

        used: called with the tokens of a call that the upstream has answered, or may have read. asked: the questions,
        and what they are about, instead of the text.
        """
        content, body = orjson.dumps(self._body(text, asked)), bytearray()
        try:
            async with asyncio.timeout(timeout_s):
                status, headers = await self._post(content, body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL) as error:  # nothing was sent
            raise CallError("connection", _reason(error), True, True, is_certain=True) from None
        except BaseException as error:
            used(_usage(None, len(content), len(body)))  # the upstream may charge for it
            if isinstance(error, TimeoutError):
                raise CallError("timeout", f"no answer within {timeout_s:.3g} s", True, True) from None
            if isinstance(error, httpx.HTTPError | OSError | ValueError):
                raise CallError("connection", _reason(error), True, True) from None
            raise
        if status != 200:
            raise _status_error(status, headers, self._of.upstream.api_key_env)
        if self._form is not None:
            return self._read_answers(self._form, body, len(content), used, asked)
        return self._read(body, len(content), used)

    async def _post(self, content: bytes, body: bytearray) -> tuple[int, httpx.Headers]:
        """The status and the headers of a response, whose body is appended to `body`.

        Raises CallError for a body that is too large.
        """
        async with self._open().stream(
            "POST", self._of.upstream.url, content=content, headers=self._headers
        ) as response:
            if response.status_code != 200:
                return response.status_code, response.headers
            if response.headers.get("content-encoding", "identity") != "identity":
                raise CallError("invalid", "the response is compressed", False, True)
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_RESPONSE_BYTES:
                    raise CallError(
                        "invalid", f"the response has more than {MAX_RESPONSE_BYTES} bytes", False, True
                    )
            return 200, response.headers

    def _body(self, text: Text, asked: Asked | None) -> dict[str, Any]:
        one, pair = self._of.upstream, text.text_pair
        name = {} if one.model is None else {"model": one.model}
        given = text.text if pair is None else {"text": text.text, "text_pair": pair}
        if self._form is not None:
            state, questions = asked or Asked(given, self._questions)
            return {**name, **body_of(self._form, state, questions), **one.parameters}
        if one.prompt is None:
            return {**name, "input": given, **one.parameters}
        values = {"labels": ", ".join(self._of.labels), "text": text.text, "text_pair": text.text_pair or ""}
        message = PLACEHOLDER.sub(
            lambda found: values[found[1]], one.prompt
        )  # braces in a text stay as they are
        return {**name, "messages": [{"role": "user", "content": message}], **one.parameters}

    def _read_answers(
        self, form: Form, body: bytearray, sent: int, used: Callable[[Usage], None], asked: Asked | None
    ) -> Reply:
        try:
            content = orjson.loads(body)
            questions = self._questions if asked is None else asked.questions
            answers = probabilities_in(form, content, questions)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            used(_usage(None, sent, len(body)))
            raise CallError(
                "invalid", "the response does not have the expected format", False, True
            ) from None
        used(_usage(content.get("usage"), sent, len(body)))
        if asked is not None:
            return Reply(0, answers=answers)
        probs = answers[0]
        if probs is None:
            raise CallError("reply", "it refuses to answer", False, False)
        if self._of.upstream.ask == "predicate":
            probs = [1.0 - probs[0], probs[0]]
        return Reply(probs.index(max(probs)), probs)

    def _read(self, body: bytearray, sent: int, used: Callable[[Usage], None]) -> Reply:
        try:
            content = orjson.loads(body)
            one = content["data"][0] if self._of.upstream.prompt is None else content["choices"][0]["message"]
            label = one["label"] if self._of.upstream.prompt is None else one.get("content")
            if label is None:
                label = ""  # the model refuses to answer, or a filter has removed the answer
            if not isinstance(label, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            used(_usage(None, sent, len(body)))
            raise CallError(
                "invalid", "the response does not have the expected format", False, True
            ) from None
        used(_usage(content.get("usage"), sent, len(body)))
        if self._of.upstream.prompt is None:
            number, is_extracted = self._names.find(label, is_exact=True)
        else:
            number, is_extracted = self._names.find(label, self._of.upstream.reply == "exact")
        if number is None:
            # The reply itself is not shown: it may quote the text, or the prompt.
            raise CallError("reply", "its reply names no label, or several", True, False)
        probs = _probabilities(one.get("probs"), number, len(self._of.labels))
        return Reply(number, probs, is_extracted)


def _question(of: UpstreamOf) -> Question:
    """The question that asks a decision server for a model's label."""
    one = of.upstream
    if one.ask == "predicate":
        return Question("predicate", one.prompt)
    return Question("choice", one.prompt, [Option(label, one.criteria.get(label)) for label in of.labels])


def _probabilities(values: Any, label: int, count: int) -> list[float] | None:
    """The probabilities in an answer of /classify, if they are in the order of the labels; None if they are not."""
    if not isinstance(values, list) or len(values) != count:
        return None
    if not all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in values):
        return None
    # If several are largest, the first one is the answer wherever an answer is read from probabilities.
    is_ordered = values.index(max(values)) == label and abs(sum(values) - 1) <= max(
        SUM_TOLERANCE, 1e-6 * count
    )
    return [float(p) for p in values] if is_ordered else None


def _usage(found: Any, sent: int, received: int) -> Usage:
    """The tokens that a response reports or, if it reports none, an estimate from the bytes sent and received."""
    usage = Usage(-(-sent // CHARS_PER_TOKEN), -(-received // CHARS_PER_TOKEN))
    if isinstance(found, dict):
        for name, field, other in (
            ("input", "prompt_tokens", "input_tokens"),
            ("output", "completion_tokens", "output_tokens"),
        ):
            value = found.get(field, found.get(other))
            if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKENS:
                setattr(usage, name, value)
    return usage


def _status_error(status: int, headers: httpx.Headers, key: str | None) -> CallError:
    message = f"it answers with HTTP {status}"
    if status in (401, 403):
        message += ": check api_key_env" if key is None else f": check the key in {key}"
    elif status in (404, 405):
        message += ": check the path of url, such as /v1/chat/completions"
    if status == 429:
        return CallError("rate_limited", message, True, True, _retry_after(headers))
    if status >= 500:
        return CallError("server_error", message, True, True, _retry_after(headers))
    if 300 <= status < 400:
        return CallError("redirect", f"{message}, a redirect, which is not followed", False, True)
    # 400, 413 and 422 are usually due to the text. Others, such as 404, usually fail for every text, but a firewall may
    # also answer a text with them, except for 401.
    return CallError("refused", message, False, status not in (400, 413, 422), is_certain=status == 401)


def _retry_after(headers: httpx.Headers) -> float | None:
    """The seconds in a Retry-After header; None if there is no valid one."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def _reason(error: Exception) -> str:
    """The reason of a connection error, without the URL, which may contain a secret, and without addresses."""
    reason = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", None) or cause.reason or reason
        elif isinstance(cause, OSError) and cause.errno is not None:  # below 0: of the lookup of the host
            reason = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return f"it cannot be reached ({reason})"
