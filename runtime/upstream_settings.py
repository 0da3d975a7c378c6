"""The file of a model with an upstream (`de3 serve NAME.toml`): its labels, its encoder, and the other service."""

import hashlib
import json
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from ipaddress import ip_address
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from de3.model_store.manifest import NAME
from de3.model_store.part import MAX_LABEL, MAX_LABELS
from de3.runtime.questions import MAX_OPTIONS, Form

MAX_FILE_BYTES = 2**22
RESERVED = (
    "model",
    "messages",
    "input",
    "stream",
    "n",
    "state",
    "questions",
)  # fields of the upstream's request that parameters cannot set
PLACEHOLDER = re.compile(r"\{(labels|text|text_pair)\}")
# Texts are normalized in pieces, which end at a space if there is one: the time grows with the square of the accents in
# a row.
PIECE = re.compile(r"(?s).{0,63}\s|.{1,64}")

Price = Annotated[float, Field(ge=0)]
File = TypeVar("File", bound=BaseModel)


class Upstream(BaseModel):
    """The other service.

    Attributes:
        kind: chat (OpenAI-compatible chat completions), classify (the /classify of vLLM or of another DE3), or
            decisions or systemone (a decision server's /v1/decisions or /v1/systemone).
        api_key_env: environment variable with the key; None: no key is sent.
        prompt: user message of a chat; {labels}, {text} and, for pairs, {text_pair} are filled in. Of a decision
            server, the question's instructions.
        ask: how a decision server is asked: for a choice of the labels, or whether the second of two labels is true.
        criteria: what labels mean, for a choice.
        parameters: further fields of each request, sent as they are.
        reply: how a chat's reply names a label: contains (as the only one, in words around it), or exact.
        price_per_million_tokens: price of input and of output tokens.
        max_calls_per_hour: hard limit on calls of any kind, over all processes of the server.
        concurrency: largest number of calls at a time.
        timeout_s: time limit of a call, seconds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["chat", "classify", "decisions", "systemone"]
    url: str = Field(max_length=2000)
    model: str | None = Field(None, min_length=1, max_length=500)
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    prompt: str | None = Field(None, max_length=100_000)
    ask: Literal["choice", "predicate"] = "choice"
    criteria: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    reply: Literal["contains", "exact"] = "contains"
    price_per_million_tokens: tuple[Price, Price] | None = None
    price_per_call: Price | None = None
    max_calls_per_hour: int | None = Field(None, ge=1, le=10**9)
    concurrency: int = Field(16, ge=1, le=1024)
    timeout_s: float = Field(20.0, gt=0, le=600)

    @model_validator(mode="after")
    def _check(self) -> Self:
        host = _host_of(self.url)
        if host is None:
            raise ValueError("url: must be http:// or https://, with a host and without a user name or #")
        if self.kind == "chat":
            self._check_prompt()
        elif self.prompt is not None and self.form is None:
            raise ValueError("prompt: classify has none")
        if self.form is None and (self.criteria or self.ask != "choice"):
            raise ValueError("criteria, ask: only decisions and systemone have them")
        if wrong := [name for name in RESERVED if name in self.parameters]:
            raise ValueError(f"parameters: must not contain {wrong[0]}, which the server sets")
        try:
            json.dumps(self.parameters, allow_nan=False)
            orjson.dumps(self.parameters)  # as they are sent; it refuses integers of more than 64 bits
        except (TypeError, ValueError):
            raise ValueError("parameters: must be values that JSON has") from None
        if self.price_per_call is not None and self.price_per_million_tokens is not None:
            raise ValueError(
                "price_per_call: cannot be combined with price_per_million_tokens; give one of them"
            )
        return self

    def _check_prompt(self) -> None:
        if self.model is None:
            raise ValueError("model: is required for chat")
        if self.prompt is None:
            raise ValueError("prompt: is required for chat")
        found = PLACEHOLDER.findall(self.prompt)
        if found.count("text") != 1 or found.count("text_pair") > 1:
            raise ValueError("prompt: must contain {text} once, and {text_pair} at most once")

    @property
    def form(self) -> Form | None:
        """The form in which a decision server is asked; None: it is none."""
        return self.kind if self.kind in ("decisions", "systemone") else None

    @property
    def takes_pairs(self) -> bool | None:
        """True if texts are pairs, False if they are not; None: it takes both."""
        return "{text_pair}" in self.prompt if self.kind == "chat" and self.prompt is not None else None

    @property
    def is_encrypted(self) -> bool:
        """True if texts are sent over TLS, or do not leave this machine."""
        return self.url.lower().startswith("https:") or _is_loopback(_host_of(self.url) or "")

    def key(self) -> str | None:
        """The key from the environment; raises ValueError if it is missing."""
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"upstream.api_key_env: the environment variable {self.api_key_env} has no key")
        return key


class UpstreamOf(BaseModel):
    """An upstream, and the name of what it answers for.

    Attributes:
        labels: the labels that it may give; empty: it answers questions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=f"^{NAME.pattern}$")
    labels: list[str] = []
    upstream: Upstream

    @cached_property
    def hash(self) -> str:
        """Hash of everything that determines the upstream's answers; it identifies the upstream's model."""
        one = self.upstream
        where = one.url if one.model is None else None  # the same model elsewhere is the same
        parts: tuple[Any, ...] = (
            one.kind,
            one.model,
            where,
            one.prompt,
            one.parameters,
            one.reply,
            self.labels,
        )
        if one.form is not None:
            parts += (one.ask, one.criteria)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class UpstreamModel(UpstreamOf):
    """A model with an upstream.

    Attributes:
        encoder: folder or hub id of an encoder, or a model of the store, whose exits are then used.
    """

    encoder: str = Field(min_length=1, max_length=1000)
    labels: list[Annotated[str, Field(max_length=MAX_LABEL)]] = Field(min_length=2, max_length=MAX_LABELS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        known: dict[tuple[str, ...], str] = {}
        for label in self.labels:
            words = folded(label)
            if not words:
                raise ValueError(f"labels: {label!r} has no letter or digit")
            if words in known:
                raise ValueError(
                    f"labels: {known[words]!r} and {label!r} differ only in case, spaces or punctuation, so a reply "
                    "could mean either"
                )
            known[words] = label
        one = self.upstream
        if unknown := sorted(one.criteria.keys() - {*self.labels}):
            raise ValueError(f"upstream.criteria: {unknown[0]!r} is not one of labels")
        if one.ask == "predicate" and len(self.labels) != 2:
            raise ValueError("upstream.ask: predicate needs two labels, of which the second one is true")
        if one.form is not None and len(self.labels) > MAX_OPTIONS:
            raise ValueError(
                f"labels: {len(self.labels)}; a decision server is asked for at most {MAX_OPTIONS}"
            )
        return self


def folded(text: str, max_chars: float = inf) -> tuple[str, ...]:
    """The words of a text, without case and punctuation; none if it has more than max_chars once it is normalized."""
    chars = ""
    for piece in PIECE.finditer(text):
        chars += unicodedata.normalize("NFKC", piece[0]).casefold()
        if len(chars) > max_chars:
            return ()
    return tuple("".join(c if c.isalnum() or _is_mark(c) else " " for c in chars).split())


def _is_mark(char: str) -> bool:
    """True for vowel signs and accents, which are parts of words, but not for the variants of symbols."""
    return unicodedata.category(char) in ("Mn", "Mc") and not "\ufe00" <= char <= "\ufe0f"


def read_upstream(path: Path) -> UpstreamModel:
    """The model in a .toml file; raises ValueError, which names the file and the field, and OSError."""
    return checked_file(path, UpstreamModel)


def checked_file(path: Path, kind: type[File]) -> File:
    """The contents of a .toml file; raises ValueError, which names the file and the field, and OSError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        return kind.model_validate(tomllib.loads(path.read_bytes().decode()))
    except ValidationError as error:
        first = error.errors()[0]
        where, message = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown field"
        if where:  # the messages of our own checks begin with the field
            where += "." if first["type"] == "value_error" else ": "
        raise ValueError(f"{path}: {where}{message}") from None
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: {error}") from None


def read_upstreams(names: Iterable[str]) -> list[UpstreamModel]:
    """The models with an upstream among these names, which are those of .toml files; raises as read_upstream does."""
    return [read_upstream(Path(name)) for name in names if name.endswith(".toml")]


def _host_of(url: str) -> str | None:
    """The host of an http or https URL; None if it is no such URL, or has a user name or a fragment."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return None
    is_valid = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    is_valid = is_valid and not parts.fragment and url.isascii() and url.isprintable() and " " not in url
    return parts.hostname if is_valid else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
