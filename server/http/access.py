"""API keys and rate limits."""

import hashlib
import hmac
import math
import re
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from starlette.types import Scope

from de3.runtime.errors import RequestError
from de3.server.settings import Settings
from de3.server.shared import Leases

MIN_KEY_CHARS = 16
MAX_KEYS = 256  # the key of each request is compared with all of them
MAX_FILE_BYTES = 2**20
# For the rate limit, this many bytes of a body, or tokens of a text, count as one text.
BYTES_PER_TEXT, TOKENS_PER_TEXT = 4096, 128
LEASED_PART = 50  # all processes together may lease 1/50 of a limit in advance
WINDOW_PARTS = 100
# Paths that need no key: they reveal nothing about users or texts.
OPEN = re.compile(
    r"/(|health|ready|metrics|v2/health/(live|ready)|openapi\.json|docs(/.*)?|static-offline-docs/.*|favicon\.ico)"
)
_COMMENT = re.compile(r"(^|\s)#.*")
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_RATE = re.compile(
    r"\s*0*([1-9]\d{,14})\s*(?:/|per)\s*([1-9]\d{,5})?\s*(second|minute|hour|day|month|year)s?\s*",
    re.ASCII | re.I,
)
_SECONDS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "month": 30 * 86_400,
    "year": 360 * 86_400,
}


class Keys:
    """API keys, stored as SHA-256 digests. Each has an owner, who may have several keys.

    A key is compared with every digest, in constant time, so that timing reveals nothing about the keys.
    """

    def __init__(self, owners: dict[bytes, str]) -> None:
        """owners: owners by the digest of their key."""
        self._owners = owners

    @classmethod
    def read(cls, text: str, where: str) -> "Keys":
        """Keys from lines of `name key` or `name sha256:digest`, with comments after #.

        where: source of the lines, for messages, which never show a key. Raises ValueError for an invalid line, for a
        key that appears twice, and if there is no key or more than MAX_KEYS.
        """
        owners: dict[bytes, str] = {}
        for number, line in enumerate(text.splitlines(), 1):
            parts = _COMMENT.sub("", line).split()
            if not parts:
                continue
            place = f"{where}, line {number}"
            if len(parts) != 2:
                raise ValueError(f"{place}: must be a name and a key, or a name and sha256:digest")
            name, key = parts
            if not _NAME.fullmatch(name):
                raise ValueError(f"{place}: a name has up to 64 letters, digits and _ . -")
            hashed = _DIGEST.fullmatch(key)
            if hashed is None and (key.startswith("sha256:") or len(key) < MIN_KEY_CHARS):
                raise ValueError(
                    f"{place}: a key has at least {MIN_KEY_CHARS} characters, a digest 64 hex digits"
                )
            digest = bytes.fromhex(hashed[1]) if hashed else _digest(key.encode())
            if digest in owners:
                raise ValueError(f"{place}: {owners[digest]} already has this key")
            owners[digest] = name
        if not owners:
            raise ValueError(f"{where}: contains no key")
        if len(owners) > MAX_KEYS:
            raise ValueError(f"{where}: {len(owners)} keys; at most {MAX_KEYS} are allowed")
        return cls(owners)

    @classmethod
    def from_file(cls, path: Path) -> "Keys":
        """Keys from a file with lines as for read().

        Raises OSError if it cannot be read, and ValueError if it is larger than MAX_FILE_BYTES, is not text, or has
        lines that read() refuses.
        """
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return cls.read(path.read_text(), str(path))

    @property
    def lines(self) -> str:
        """The keys' digests, as lines for read()."""
        return "\n".join(f"{name} sha256:{digest.hex()}" for digest, name in self._owners.items())

    def shares_with(self, others: "Keys") -> bool:
        """True if the two have a key in common."""
        return not self._owners.keys().isdisjoint(others._owners)

    def owner(self, scope: Scope) -> str:
        """The owner of the key in `Authorization: Bearer KEY`; raises RequestError if it is missing or unknown."""
        for header, value in scope["headers"]:
            if header == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() == b"bearer" and (name := self._find(key.strip())) is not None:
                    return name
                raise RequestError("this API key is unknown; send Authorization: Bearer KEY", cause="no_key")
        raise RequestError("an API key is needed; send Authorization: Bearer KEY", cause="no_key")

    def _find(self, key: bytes) -> str | None:
        sent, owner = _digest(key), None
        for digest, name in self._owners.items():
            if hmac.compare_digest(sent, digest):
                owner = name
        return owner


class Access:
    """Authorization. Without user keys, any client may classify; without admin keys, none may change the models.

    Attributes:
        users, admins: the user keys and the admin keys; None if there are none.
        limit: the rate limit of the user keys; None if there is none.
    """

    def __init__(self, settings: Settings, leases: Leases | None = None) -> None:
        """leases: the rate limits of all processes, kept by the supervisor; None: this is the only process.

        Raises ValueError for keys that are invalid, cannot be read, or are set both directly and by a file; for a key
        of both a user and an admin; and for a rate limit that is invalid or set without user keys.
        """
        self.users = _keys(settings.api_keys, settings.api_keys_file, "DE3_API_KEYS")
        self.admins = _keys(settings.admin_keys, settings.admin_keys_file, "DE3_ADMIN_KEYS")
        if self.users is not None and self.admins is not None and self.users.shares_with(self.admins):
            raise ValueError("admin_keys: a key cannot be both a user's and an admin's")
        self.limit: RateLimit | None = None
        if settings.rate_limit and leases is not None:
            self.limit = LeasedRateLimit(settings.rate_limit, leases, settings.processes)
        elif settings.rate_limit:
            self.limit = RateLimit(settings.rate_limit)
        if self.limit is not None and self.users is None:
            raise ValueError("rate_limit: applies to API keys, and there are none; give api_keys_file")

    @property
    def keys(self) -> dict[str, Any]:
        """The settings of the API keys, by name, with digests in place of keys and key files."""
        found = {"api_keys": self.users, "admin_keys": self.admins}
        return {name: keys and SecretStr(keys.lines) for name, keys in found.items()} | {
            f"{name}_file": None for name in found
        }

    def user(self, scope: Scope) -> str:
        """The owner of a classification request's key; empty if no key is needed.

        Raises RequestError if a key is needed and is missing or unknown.
        """
        return "" if self.users is None else self.users.owner(scope)

    def reader(self, scope: Scope) -> str | None:
        """The tenant that reads its own data, or None for a client that may read everything.

        This is an admin, or any client of a server without user keys. Raises RequestError unless the client may read.
        """
        if self.users is None:
            return None
        try:
            return self.users.owner(scope)
        except RequestError:
            if self.admins is None:
                raise
            self.admins.owner(scope)
            return None

    def check(self, path: str, scope: Scope) -> str:
        """Authorize a request that does not classify; returns the admin's name if it needed an admin's key, else "".

        Health, readiness, metrics, the web page and the documentation are open. On every other path, a server with
        admin keys requires one for every method but GET, HEAD and OPTIONS, and a server with user keys requires a
        user's or an admin's key for all other requests. This includes unknown paths, so that no route is open by
        mistake. Raises RequestError if the key is missing, unknown or not sufficient.
        """
        if OPEN.fullmatch(path):
            return ""
        if self.admins is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            self.reader(scope)
            return ""
        try:
            return self.admins.owner(scope)
        except RequestError:
            if self.users is not None:
                self.users.owner(scope)
                raise RequestError("this needs an admin's key", cause="forbidden") from None
            raise


def _keys(lines: SecretStr | None, path: Path | None, variable: str) -> Keys | None:
    if lines is not None and path is not None:
        raise ValueError(f"{variable}: give keys in the variable or in a file, not both")
    if lines is not None:
        return Keys.read(lines.get_secret_value().replace(";", "\n"), variable)
    if path is None:
        return None
    try:
        return Keys.from_file(path)
    except OSError as error:
        raise ValueError(f"{variable}_FILE: cannot be read: {error}") from None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Charge:
    """The charge of a request against its owner's rate limit, in texts; it grows as the cost becomes known.

    Attributes:
        limit: the rate limit; None: there is none.
    """

    def __init__(self, limit: "RateLimit | None", owner: str) -> None:
        self.limit, self._owner, self._texts = limit, owner, 0

    async def raise_to(self, texts: int) -> None:
        """Increase the charge to this many texts in total; raises RequestError if that would exceed the limit."""
        if self.limit is not None and texts > self._texts:
            self.limit.check(texts)
            await self.limit.take(self._owner, texts - self._texts)
            self._texts = texts

    def settle(self, texts: int) -> None:
        """Increase the charge to this many texts in total, for work already done, even beyond the limit."""
        if self.limit is not None and texts > self._texts:
            self.limit.drain(self._owner, texts - self._texts)
            self._texts = texts


@dataclass(slots=True)
class _Part:
    """Texts that were counted shortly after one another.

    Attributes:
        first, last: times of the first and the last of them (monotonic seconds); `last` is later if they exceed the
            limit.
    """

    first: float
    last: float
    texts: int


class _Window:
    """The texts of one owner in the last `period_s` seconds.

    Those that were counted within a hundredth of the period expire together, with the last of them: this bounds the
    memory, and no period has more texts than the limit. Texts beyond the limit, whose cost was not known before they
    ran, expire later: the delay is the time in which the limit allows that many texts.
    """

    def __init__(self, limit: int, period_s: float) -> None:
        self._limit, self._period_s, self._texts = limit, period_s, 0
        self._parts: deque[_Part] = deque()

    def texts(self, now: float) -> int:
        while self._parts and self._parts[0].last + self._period_s <= now:
            self._texts -= self._parts.popleft().texts
        return self._texts

    def add(self, texts: int, now: float) -> None:
        self._texts = self.texts(now) + texts
        latest = self._parts[-1].last if self._parts else now
        if not self._parts or now >= self._parts[-1].first + self._period_s / WINDOW_PARTS:
            self._parts.append(_Part(now, now, 0))
        part, excess = self._parts[-1], min(texts, max(0, self._texts - self._limit))
        part.texts += texts
        part.last = max(latest, now) + excess / self._limit * self._period_s

    def wait_s(self, texts: int, now: float) -> float:
        """Seconds until at least this many texts have expired."""
        for part in self._parts:
            texts -= part.texts
            if texts <= 0:
                return part.last + self._period_s - now
        return self._period_s


class RateLimit:
    """A limit on the texts of each owner of keys per second, minute, hour or day, over a sliding window.

    A request costs the largest of: the number of its texts; its body in units of 4 KiB, rounded up; and the tokens
    of its texts in units of 128, rounded up for each text.
    """

    def __init__(self, rate: str) -> None:
        """rate: such as 100/second or 5000/minute. Raises ValueError for an invalid one."""
        parts = _RATE.fullmatch(rate)
        if parts is None:
            raise ValueError(f"rate_limit: {rate!r} is not a rate; give for example 100/second")
        self._rate, self._amount = rate.strip(), int(parts[1])
        period_s = int(parts[2] or 1) * _SECONDS[parts[3].lower()]
        # By owner.
        self._windows: defaultdict[str, _Window] = defaultdict(lambda: _Window(self._amount, period_s))

    def check(self, texts: int) -> None:
        """Raise RequestError for a request that costs more than the limit ever allows."""
        if texts > self._amount:
            raise RequestError(
                f"this request costs {texts} texts, and your limit is {self._rate}: send fewer at a time",
                cause="rate_limited",
            )

    def remaining(self, owner: str) -> int:
        """Number of texts that the limit still allows an owner now."""
        return max(0, self._amount - self._windows[owner].texts(time.monotonic()))

    def hit(self, owner: str, texts: int) -> None:
        """Count texts of an owner; raises RequestError if that would exceed the limit."""
        window, now = self._windows[owner], time.monotonic()
        missing = window.texts(now) + texts - self._amount
        if missing > 0:
            wait = max(1, math.ceil(window.wait_s(missing, now)))
            raise RequestError(
                f"over your rate limit, in texts: {self._rate}", cause="rate_limited", retry_after_s=wait
            )
        window.add(texts, now)

    async def take(self, owner: str, texts: int) -> None:
        """Count texts of an owner, in all processes; raises RequestError if that would exceed the limit."""
        self.hit(owner, texts)

    def drain(self, owner: str, texts: int) -> None:
        """Count texts of an owner that already ran, even beyond the limit; later texts then wait longer."""
        self._windows[owner].add(texts, time.monotonic())


class LeasedRateLimit(RateLimit):
    """A rate limit that several processes share: each leases texts in advance.

    Together they lease at most a 50th of the limit, each an equal part. So a window may have that many texts more than
    the limit (leased before it began), or fewer (leased but unused).
    """

    def __init__(self, rate: str, leases: Leases, processes: int) -> None:
        """leases: the limit of all processes. processes: their number. Raises ValueError as RateLimit does."""
        super().__init__(rate)
        self._leases, self._block = leases, self._amount // (LEASED_PART * processes)
        self._leased = Counter[str]()  # unused texts by owner, at most _block
        self._leasing: set[str] = set()  # owners for whom a block is being leased

    async def take(self, owner: str, texts: int) -> None:
        """Count texts of an owner, leased ones if there are enough; raises RequestError as RateLimit.take does."""
        if self._leased[owner] >= texts:
            self._leased[owner] -= texts
        elif self._block <= texts or owner in self._leasing:
            await self._leases.lease(owner, texts)
        else:
            self._leasing.add(owner)
            try:
                await self._leases.lease(owner, self._block)
                self._leased[owner] += self._block - texts
            except RequestError:  # the limit allows fewer texts
                await self._leases.lease(owner, texts)
            finally:
                self._leasing.discard(owner)

    def drain(self, owner: str, texts: int) -> None:
        """Count texts of an owner that already ran, leased ones first, even beyond the limit."""
        leased = min(texts, self._leased[owner])
        self._leased[owner] -= leased
        if texts > leased:
            self._leases.charge(owner, texts - leased)
