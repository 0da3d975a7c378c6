"""A bounded sample of the records of one model's traffic."""

import math

import numpy as np
from numpy.typing import NDArray

from de3.model_store.fitted import MOST_PIECES
from de3.model_store.records import Records
from de3.server.learn.record import Record

MOST_RECORDS = 100_000
HALF_LIFE = 200_000.0  # texts; exits thus follow traffic that changes, and forget rare texts slowly
MAX_NAMES = 1024  # clients counted separately; all others count as one
OTHERS = "*others"  # not a possible name of a client


class Reservoir:
    """A weighted random sample of the records, in limited memory (Efraimidis & Spirakis, 2006).

    A record's weight is the number of texts that it stands for, 1 / share. The weights of later records double with
    every half_life texts, so newer texts replace older ones. A client that has more than half of a full reservoir loses
    its own records first.

    Attributes:
        texts: estimated number of texts so far; a record's number is this value, rounded down, once it is counted.
    """

    def __init__(
        self,
        base: str,
        shape: tuple[int, int],
        labels: int,
        max_bytes: int,
        half_life: float = HALF_LIFE,
        seed: int = 0,
        ids: int = 0,
    ) -> None:
        """base: see Records. shape: of a record's states. labels: K. max_bytes: memory limit. half_life: in texts.

        ids: most tokens of a text of a token classifier, which has 0 labels.
        """
        self.base, self._half_life, self._random = base, half_life, np.random.default_rng(seed)
        size = 2 * shape[0] * shape[1] + 4 * (labels + ids + MOST_PIECES) + 41
        self.capacity = max(1, min(max_bytes // size, MOST_RECORDS))
        self.texts = 0.0
        self._count = 0
        # np.empty takes no memory before rows are filled.
        self._states = np.empty((self.capacity, *shape), np.float16)
        self._logits = np.empty((self.capacity, labels), np.float32)
        self._ids = np.empty((self.capacity, ids), np.int32)
        self._pieces = np.empty((self.capacity, MOST_PIECES), np.uint32)
        self._spreads = np.empty(self.capacity, np.float32)
        self._shares, self._ranks = np.empty(self.capacity), np.empty(self.capacity)
        self._keys = np.empty(self.capacity, np.uint64)
        self._numbers = np.empty(self.capacity, np.int64)
        self._clients = np.empty(self.capacity, np.int32)
        self._extra = np.empty(self.capacity, np.bool_)
        self._names: dict[str, int] = {}  # index of each client, by name
        self._held = np.zeros(MAX_NAMES + 1, np.int64)  # records of each client
        self._texts = np.zeros(MAX_NAMES + 1)  # texts of each client, estimated

    def __len__(self) -> int:
        return self._count

    def add(self, record: Record) -> None:
        """Add a record; if there is no room, it replaces another one or is not kept."""
        stands_for = 0.0 if record.is_extra else 1 / record.share
        self.texts += stands_for
        number, client = int(self.texts), self._client(record.client)
        self._texts[client] += stands_for
        rank = float(self._rank(np.array([record.share]), np.array([number]))[0])
        slot = self._slot(rank, client)
        if slot is None:
            return
        self._states[slot], self._logits[slot], self._shares[slot] = (
            record.states,
            record.logits,
            record.share,
        )
        self._keys[slot], self._numbers[slot], self._clients[slot] = record.key, number, client
        self._extra[slot], self._spreads[slot] = record.is_extra, record.spread
        self._pieces[slot] = record.pieces
        self._ids[slot] = -1
        self._ids[slot, : len(record.ids)] = record.ids
        self._ranks[slot] = rank
        self._held[client] += 1

    def _rank(self, shares: NDArray[np.float64], numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """log(Exp(1) / weight) of each record; the records with the smallest ranks are a random sample by weight."""
        weights = -np.log(shares) + numbers * (math.log(2) / self._half_life)
        times = self._random.exponential(size=len(shares))
        return np.asarray(np.log(np.maximum(times, 1e-300)) - weights)

    def _slot(self, rank: float, client: int) -> int | None:
        """Find a place for a new record, freeing one if there is no room; None if the new record is not kept."""
        if self._count < self.capacity:
            self._count += 1
            return self._count - 1
        heaviest = int(self._held.argmax())
        ranks = self._ranks
        if 2 * self._held[heaviest] > self.capacity and len(self._names) > 1:
            ranks = np.where(self._clients == heaviest, ranks, -math.inf)
        slot = int(ranks.argmax())
        if rank >= ranks[slot] and (client == heaviest or ranks is self._ranks):
            return None
        self._held[self._clients[slot]] -= 1
        return slot

    def _client(self, name: str) -> int:
        if name not in self._names and len(self._names) >= MAX_NAMES:
            name = OTHERS
        return self._names.setdefault(name, len(self._names))

    def records(self) -> Records:
        """A copy of the records, in the order of their numbers."""
        order = np.argsort(self._numbers[: self._count], kind="stable")
        return Records(
            *(self.base, self._states[order], self._logits[order], self._shares[order], self._keys[order]),
            *(self._numbers[order], self._clients[order], list(self._names)),
            self._texts[: len(self._names)].tolist(),
            self._extra[order],
            self._ids[order],
            self._pieces[order],
            self._spreads[order],
        )

    def restore(self, records: Records) -> None:
        """Begin with saved records, the newest if there is no room for all.

        Raises ValueError if they are from another model or have another shape.
        """
        records.check(self.base, *self._states.shape[1:], self._logits.shape[1], self._ids.shape[1])
        kept = records.part(np.arange(len(records))[-self.capacity :])
        self._count = count = len(kept)
        self._states[:count], self._logits[:count], self._ids[:count] = kept.states, kept.logits, kept.ids
        self._shares[:count], self._keys[:count] = kept.shares, kept.keys
        self._pieces[:count], self._spreads[:count] = kept.pieces, kept.spreads
        self._numbers[:count], self._extra[:count] = kept.numbers, kept.extra
        indices = np.array([self._client(name) for name in records.names])
        np.add.at(self._texts, indices, records.texts)
        self._clients[:count] = indices[kept.clients]
        self._held[:] = np.bincount(self._clients[:count], minlength=len(self._held))
        self._ranks[:count] = self._rank(kept.shares, kept.numbers)
        self.texts = max(self.texts, float(kept.numbers.max()))
