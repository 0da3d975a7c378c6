"""Limits on the time and the size of an HTTP response. httpx has neither: its timeouts are for a single read."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import httpcore
import httpx

_end: ContextVar[float] = ContextVar("_end", default=inf)
CONNECTED = {f"connection.{name}.complete" for name in ("connect_tcp", "connect_unix_socket", "start_tls")}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within this context, connections that `trace` has patched raise ReadTimeout on reads after this time."""
    token = _end.set(monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(token)


def trace(event: str, info: dict[str, Any]) -> None:
    """Value of a request's extension `trace`: makes reads from its new connections observe time_limit."""
    if event in CONNECTED:
        stream = info["return_value"]
        stream.read = partial(_read, stream.read)


def _read(read: Callable[[int, float], bytes], max_bytes: int, timeout: float | None = None) -> bytes:
    left_s = _end.get() - monotonic()
    if left_s <= 0:
        raise httpcore.ReadTimeout("the response did not arrive in time")
    return read(max_bytes, left_s if timeout is None else min(left_s, timeout))


class Body:
    """The body of a response, decompressed as it arrives, up to a limit.

    Without the limit, a small compressed response could fill the memory. Requests must accept gzip only.
    """

    def __init__(self, response: httpx.Response, max_bytes: int) -> None:
        """max_bytes: limit on the decompressed body. Raises ValueError for an encoding other than gzip."""
        self._chunks: list[bytes] = []
        self._left = self._max_bytes = max_bytes
        encoding = response.headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            raise ValueError(f"the Content-Encoding is {encoding:.50}")
        self._gzip = zlib.decompressobj(16 + zlib.MAX_WBITS) if encoding == "gzip" else None

    def add(self, chunk: bytes) -> None:
        """Add received bytes; raises ValueError for a body that is too large, or not gzip."""
        if self._gzip is not None:
            try:
                chunk = self._gzip.decompress(chunk, self._left + 1)
            except zlib.error as error:
                raise ValueError(f"not gzip: {error}") from None
        self._left -= len(chunk)
        if self._left < 0:
            raise ValueError(f"more than {self._max_bytes} bytes")
        self._chunks.append(chunk)

    def whole(self) -> bytes:
        """The whole body, once all of it is received; raises ValueError if its compressed form is incomplete."""
        if self._gzip is not None and not self._gzip.eof:
            raise ValueError("incomplete gzip")
        return b"".join(self._chunks)
