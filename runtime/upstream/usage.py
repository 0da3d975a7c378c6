"""The use of an upstream: its calls, its failures and its cost, which survive restarts in the state folder."""

import logging
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import monotonic, time
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field

from de3.model_store.regular_file import read_regular_file, write_private_file
from de3.runtime.engine.request import Text
from de3.runtime.networks import network_of
from de3.runtime.upstream.client import Asked, Failure, Usage
from de3.runtime.upstream_settings import UpstreamOf

log = logging.getLogger("de3")
# Why a call was made: no τ was proved yet; no exit was sure; the audit of an answer of the model; the second call of an
# audit; a further attempt after a failure.
Kind = Literal["learning", "uncertain", "audit", "repeat", "retry"]

HOUR_S, SLOT_S = 3600, 10  # calls are limited in each hour, counted in slots
RECENT_S = 300.0  # period of the share of local answers
STALE_S = 60.0  # older latencies are not used, so that a budget shorter than them is tried again
LATENCIES = 64  # calls whose median is the usual latency
MAX_STATE_BYTES = 2**20
HASH_DIGITS = 12
MAX_CLIENTS = (
    256  # clients that are remembered, those that asked last; each has a share of max_calls_per_hour
)
MAX_COUNT, MAX_COST = 2**53, 1e15  # larger totals are not saved exactly
STARTED = time() - monotonic()

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Query(NamedTuple):
    """A text that an upstream is asked for.

    Attributes:
        client: fair-share key.
        is_audit: the answer is also an audit, of which a share is repeated.
        asked: questions, which it answers instead; None: there are none.
    """

    text: Text
    kind: Kind
    client: str = ""
    is_audit: bool = False
    asked: Asked | None = None


class Totals(BaseModel):
    """Totals of a model's upstream, as they are saved.

    Attributes:
        upstream: hash of the upstream; see UpstreamOf.hash.
        calls, failures: by kind, and by reason.
        tokens: input and output tokens.
        cost: price of the calls, in the currency of the settings' prices.
        local: number of texts that the model has answered.
        extracted: replies in which the label was found among other words.
        repeats, differing: audits that called twice, and those of them whose labels differ.
        slots: number of calls by slot of SLOT_S since 1970, of the last hour; clients are not saved.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    schema_version: Literal[1] = 1
    upstream: str = Field(max_length=64)
    calls: dict[Kind, Count] = {}
    failures: dict[Failure, Count] = {}
    tokens: tuple[Count, Count] = (0, 0)
    cost: Amount = 0.0
    local: Count = 0
    extracted: Count = 0
    repeats: Count = 0
    differing: Count = 0
    slots: Annotated[dict[int, Count], Field(max_length=2 * HOUR_S // SLOT_S)] = {}


def steady_time() -> float:
    """Seconds since 1970 by the system's clock when the process started; later changes of that clock are ignored."""
    return STARTED + monotonic()


class UpstreamUsage:
    """Counts the use of one model's upstream.

    Attributes:
        totals: since the first start with this upstream and state folder.
    """

    def __init__(
        self, of: UpstreamOf, state_dir: Path | None, clock: Callable[[], float] = steady_time
    ) -> None:
        """clock: seconds since 1970; must not jump."""
        self._of, self._clock = of.upstream, clock
        self._path = (
            None if state_dir is None else state_dir / "upstream" / f"{of.name}-{of.hash[:HASH_DIGITS]}.json"
        )
        self.totals = self._read(of.hash)
        self.totals.calls = dict.fromkeys(get_args(Kind), 0) | self.totals.calls
        self.totals.failures = dict.fromkeys(get_args(Failure), 0) | self.totals.failures
        # Times and latencies of the last calls, by client, the one that called last at the end; "": of all.
        self._latencies: dict[str, deque[tuple[float, float]]] = {}
        self._recent: deque[tuple[float, int, int]] = deque()  # time, local answers, other answers
        self._saved = ""
        # Clients without a key count as one for each network, as an attacker can have many addresses in one.
        self._by_slot: dict[int, Counter[str]] = {}  # calls of this process by slot and client
        self._by_client = Counter[str]()  # their sums
        # Time when each client last made a call, or was refused one for the quota, in order of time.
        self._asked: dict[str, float] = {}
        self.totals.slots = self._last_hour(self._clock())
        self._take_slots(of.name)

    def _read(self, of: str) -> Totals:
        new = Totals(upstream=of)
        if self._path is None:
            return new
        try:
            found = Totals.model_validate_json(read_regular_file(self._path, MAX_STATE_BYTES))
            if found.upstream != of:
                raise ValueError("it belongs to another upstream")
            return found
        except FileNotFoundError:
            return new
        except (OSError, ValueError) as error:
            log.error("state_dir: %s cannot be used, so its counts begin anew: %s", self._path, error)
            return new

    def _take_slots(self, name: str) -> None:
        """Add the calls that other upstreams of this model made in the last hour, and remove them from their files.

        The limit on calls is the server's, so a changed prompt does not begin a new hour.
        """
        if self._path is None or self._of.max_calls_per_hour is None:
            return
        for path in self._path.parent.glob(f"{name}-{'?' * HASH_DIGITS}.json"):
            if path == self._path:
                continue
            with suppress(OSError, ValueError):
                other = Totals.model_validate_json(read_regular_file(path, MAX_STATE_BYTES))
                for slot, count in other.slots.items():
                    self.totals.slots[slot] = self.totals.slots.get(slot, 0) + count
                self.totals.slots = self._last_hour(self._clock())
                self.save()
                write_private_file(path, other.model_copy(update={"slots": {}}).model_dump_json().encode())

    def save(self) -> None:
        """Write the totals, if they have changed; raises OSError. Any thread may call it."""
        if self._path is None:
            return
        content = self.totals.model_dump_json()
        if content != self._saved:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private_file(self._path, content.encode())
            self._saved = content

    def quota_wait_s(self, client: str | None = None) -> float:
        """Seconds until max_calls_per_hour allows a client's next call; 0: now. None: any client's.

        A client that is alone may use all of the limit. What remains is shared: a call is refused if the other clients
        that have asked within an hour could then not make as many calls each as this client (max-min fairness). A first
        call is refused only at the limit.
        """
        most, now = self._of.max_calls_per_hour, self._clock()
        if most is None:
            return 0.0
        slots = self._last_hour(now)
        excess = sum(slots.values()) - most + 1
        if client is not None:
            client = network_of(client)
            while self._asked and self._asked[first := next(iter(self._asked))] < now - HOUR_S - SLOT_S:
                del self._asked[first]
            while self._by_slot and (at := next(iter(self._by_slot))) not in slots:
                self._by_client -= self._by_slot.pop(at)
            own = self._by_client[client]
            reserved = sum(max(0, own + 1 - self._by_client[one]) for one in self._asked if one != client)
            if own and excess <= 0 < excess + reserved:
                # When a call of its own expires, it may make its next one.
                slots, excess = {at: n[client] for at, n in self._by_slot.items() if n[client]}, 1
        wait_s = 0.0
        for at, count in sorted(slots.items()):
            if excess <= 0:
                break
            excess -= count
            wait_s = (at + 1) * SLOT_S + HOUR_S - now
        if client is not None and wait_s > 0:
            self._note(client, now)
        return max(0.0, wait_s)

    def _note(self, client: str, now: float) -> None:
        """Record that a client asks."""
        self._asked.pop(client, None)
        self._asked[client] = now
        if len(self._asked) > MAX_CLIENTS:
            del self._asked[next(iter(self._asked))]

    def _last_hour(self, now: float) -> dict[int, int]:
        """The calls by slot. A slot counts as a whole until its last moment is an hour ago.

        Slots in the future, saved before the system's clock was set back, count as the current one.
        """
        slots, current = Counter[int](), int(now // SLOT_S)
        for at, count in self.totals.slots.items():
            if (at + 1) * SLOT_S > now - HOUR_S:
                slots[min(at, current)] += count
        return dict(slots)

    def called(self, kind: Kind, client: str = "") -> None:
        """Count a call that begins."""
        self.totals.calls[kind] += 1
        if self._of.max_calls_per_hour is not None:
            client, now = network_of(client), self._clock()
            slots, slot = self._last_hour(now), int(now // SLOT_S)
            slots[slot] = slots.get(slot, 0) + 1
            self.totals.slots = slots  # a new dict, as other threads may be reading the former one
            self._by_slot.setdefault(slot, Counter())[client] += 1
            self._by_client[client] += 1
            self._note(client, now)
        self._pay(self._of.price_per_call or 0.0)

    def used(self, usage: Usage) -> None:
        """Count the tokens of a call."""
        tokens_in, tokens_out = self.totals.tokens
        self.totals.tokens = (
            min(tokens_in + usage.input, MAX_COUNT),
            min(tokens_out + usage.output, MAX_COUNT),
        )
        of_input, of_output = self._of.price_per_million_tokens or (0.0, 0.0)
        self._pay((usage.input * of_input + usage.output * of_output) / 1e6)

    def _pay(self, price: float) -> None:
        self.totals.cost = min(self.totals.cost + price, MAX_COST)

    def failed(self, why: Failure) -> None:
        """Count a failed call."""
        self.totals.failures[why] += 1

    def took(self, seconds: float, client: str = "") -> None:
        """Record the latency of a client's call that succeeded."""
        for one in dict.fromkeys((client, "")):
            latencies = self._latencies.pop(one, deque[tuple[float, float]](maxlen=LATENCIES))
            latencies.append((self._clock(), seconds))
            self._latencies[one] = latencies
        if len(self._latencies) > MAX_CLIENTS:
            del self._latencies[next(iter(self._latencies))]

    def usual_s(self, client: str = "") -> float:
        """Median latency of a client's last calls, or of all, seconds; 0 if there are none of the last STALE_S.

        Texts of one client may take longer than those of another.
        """
        found = list(self._latencies.get(client, ()))  # a copy, as other threads report it
        is_known = found and self._clock() - found[-1][0] < STALE_S
        return median(seconds for _, seconds in found) if is_known else 0.0

    def answered(self, local: int, others: int) -> None:
        """Count texts that were answered by the model, and by the upstream."""
        self.totals.local += local
        now = self._clock()
        if self._recent and now - self._recent[-1][0] < RECENT_S / 300:
            at, *counts = self._recent.pop()
            self._recent.append((at, counts[0] + local, counts[1] + others))
        else:
            self._recent.append((now, local, others))
        while self._recent and self._recent[0][0] < now - RECENT_S:
            self._recent.popleft()

    @property
    def local_share(self) -> float:
        """Share of texts that the model answered, of those of the last RECENT_S; 0 without texts."""
        since = self._clock() - RECENT_S
        counts = [(local, others) for at, local, others in list(self._recent) if at >= since]
        texts = sum(map(sum, counts))
        return sum(local for local, _ in counts) / texts if texts else 0.0

    @property
    def saved(self) -> float:
        """Estimated price of the calls that local answers have saved."""
        calls = sum(self.totals.calls.values())
        saved = max(0, self.totals.local - self.totals.calls["audit"] - self.totals.calls["repeat"])
        return self.totals.cost / calls * saved if calls else 0.0

    @property
    def self_disagreement(self) -> float | None:
        """Rate at which two calls for the same text differ; None without repeated audits."""
        return self.totals.differing / self.totals.repeats if self.totals.repeats else None
