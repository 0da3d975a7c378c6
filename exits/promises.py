"""A promise to all clients that no single client can break for the others.

A client whose texts are easy can make the rate of disagreement look low, and so raise τ for texts that it did not send.
Therefore each client has a `Promise` on the evidence of all other clients. A client gets the lowest τ of the other
clients' promises: the evidence allows this τ even if any one of the other clients is left out. A client that sends most
of the texts keeps its own τ, and the others get the τ that the evidence without that client allows. Several clients
together could still raise τ for the others, so a client's own recent audits also lower its τ (`RecentRates`).

Only the MAX_CLIENTS clients with the most texts are left out one by one. All further clients count as one, `OTHERS`.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from de3.exits.guarantee import CONFIDENCE
from de3.exits.promise import Profile, Promise, Reason, RecentRates

MAX_CLIENTS = 8
MAX_COUNTED = 1024  # further clients whose texts are counted
ALL, OTHERS, NEWCOMER = "", "others", "newcomer"  # no client has one of these names


class Promises:
    """The promise on all evidence, and for each client a promise that leaves out its evidence.

    Attributes:
        by_left_out: by client, the promise without that client's evidence; under `ALL`, the promise on all evidence.
        own: recent audits of each client that is left out of a promise, by client.
        texts: number of texts by client, for the clients that are left out of a promise and up to MAX_COUNTED others.
    """

    def __init__(
        self, rate: float, taus: NDArray[np.float64], start: int = 0, error: float = 1 - CONFIDENCE
    ) -> None:
        """rate, taus, start, error: see Promise."""
        self.rate, self.taus, self.start, self.error = rate, taus, start, error
        self.by_left_out: dict[str, Promise] = {ALL: Promise(rate, taus, start, error)}
        self.own: dict[str, RecentRates] = {}
        self.texts = Counter[str]()

    @property
    def of_all(self) -> Promise:
        """The promise on the evidence of all clients."""
        return self.by_left_out[ALL]

    def deciding(self, client: str) -> Promise:
        """The promise with the lowest τ among those that leave out another client; `of_all` if there is none."""
        key = self._key(client)
        others = [promise for left_out, promise in self.by_left_out.items() if left_out not in (key, ALL)]
        return min(others, key=lambda promise: promise.index, default=self.of_all)

    def choose(self, client: str) -> tuple[float, Reason]:
        """The τ of a client's requests, and the reason for it."""
        promise = self.deciding(client)
        own = self.own.get(self._key(client))
        index = promise.index if own is None else own.allows(promise.index)
        return float(self.taus[index]), promise.reason if index == promise.index else "recent"

    def tracked(self) -> list[str]:
        """The clients that are left out one by one, the one with the most texts first."""
        names = [name for name in self.by_left_out if name not in (ALL, OTHERS)]
        return sorted(names, key=lambda name: -self.texts[name])

    def skip(self, client: str, share: float, texts: int, repeats: int = 0) -> None:
        """Count texts of a client that were not audited. repeats: number of these texts that were counted before."""
        key = self._count(client, texts)
        for left_out, promise in self.by_left_out.items():
            if left_out != key:
                promise.skip(share, texts, repeats)

    def add(self, client: str, share: float, audit: Profile, is_repeat: bool = False) -> list[str]:
        """Count an audit; returns the keys in `by_left_out` of promises that were reset because the rate has risen."""
        key, changed = self._count(client, 1), list[str]()
        self.own[key].add(share if self.of_all.index else 0.0, audit.differs)
        for left_out, promise in self.by_left_out.items():
            if left_out != key:
                promise.add(share, audit, is_repeat)
                if promise.reason == "change" and not promise.evidence.tallies:
                    changed.append(left_out)
        return changed

    def advance(self) -> None:
        """Raise each promise's τ as far as its evidence and its recent audits allow."""
        for promise in self.by_left_out.values():
            promise.advance()

    def reset(self, reason: Reason) -> None:
        """Discard all evidence, and return to τ = 0."""
        self.of_all.reset(reason)
        self.by_left_out, self.own = {ALL: self.of_all}, {}
        self.texts.clear()

    def _key(self, client: str) -> str:
        """A client's key in `by_left_out`: its name if it has a promise or there is room for one, else OTHERS."""
        is_full = len(self.by_left_out) > MAX_CLIENTS + (OTHERS in self.by_left_out)
        return client if client in self.by_left_out or not is_full else OTHERS

    def _count(self, client: str, texts: int) -> str:
        """Count texts, and return the key of their client."""
        self.texts[client] += texts
        key = self._key(client)
        if key == OTHERS:
            lightest = self.tracked()[-1]
            if self.texts[client] > self.texts[lightest]:
                del self.by_left_out[lightest], self.own[lightest]
                key = client
            elif len(self.texts) > MAX_CLIENTS + MAX_COUNTED:
                self._forget()
        if key not in self.by_left_out:
            # The copy includes this client's earlier evidence: no more texts than each tracked client has sent.
            self.by_left_out[key] = self.of_all.copy()
            self.own[key] = RecentRates(self.rate, len(self.taus))
        return key

    def _forget(self) -> None:
        """Stop counting the texts of clients that have few of them and are not left out of a promise."""
        tracked = self.tracked()
        kept = [item for item in self.texts.most_common() if item[0] not in self.by_left_out]
        self.texts = Counter({name: self.texts[name] for name in tracked} | dict(kept[: MAX_COUNTED // 2]))
