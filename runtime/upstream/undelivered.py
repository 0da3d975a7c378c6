"""Answers of upstreams to requests that failed, so that a retry does not pay for them again."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import monotonic

import orjson

from de3.model_store.manifest import Manifest
from de3.runtime.engine.request import Text
from de3.runtime.upstream.client import Reply

KEPT_S, MAX_KEPT = 60.0, 4096


def key_of(manifest: Manifest, text: Text, client: str = "") -> bytes:
    """Hash of an upstream, a text and the client that is answered, if there are several."""
    parts = orjson.dumps([manifest.upstream, text.text, text.text_pair, *([client] if client else [])])
    return hashlib.blake2b(parts, digest_size=16).digest()


class Undelivered:
    """The latest such answers, by key_of(), for KEPT_S; each is used once."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._replies: OrderedDict[bytes, tuple[float, Reply]] = OrderedDict()

    def add(self, replies: Mapping[bytes, Reply]) -> None:
        """Keep the answers of a request that failed."""
        now = self._clock()
        for key, reply in replies.items():
            self._replies[key] = now, reply
            self._replies.move_to_end(key)
        while len(self._replies) > MAX_KEPT:
            self._replies.popitem(last=False)

    def take(self, key: bytes) -> Reply | None:
        """Remove and return an answer; None if there is none that is recent."""
        at, reply = self._replies.pop(key, (0.0, None))
        return reply if reply is not None and self._clock() - at < KEPT_S else None
