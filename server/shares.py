"""Fair shares of a limited amount: texts in flight, bytes of bodies in flight."""

from collections.abc import Callable

from de3.server.errors import RequestError

SPARE = 1 / 8  # of the limit, beyond it: for other clients when one holds all of it


class Shares:
    """A limited amount, shared between those who use it now.

    A client that is alone may hold the whole limit. Otherwise none may hold more than would then be left for
    the others: each client that takes as much as it can leaves half of what was free, so that there is
    something for the next one.

    Attributes:
        limit: what a client may hold if it is alone.
        most: all there is.
        total: what is held.
    """

    def __init__(self, limit: int, what: str, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        """what: the unit, for messages. retry_after_s: for a refusal."""
        self.limit, self._what, self._retry_after_s = limit, what, retry_after_s
        self.most = limit + max(1, int(SPARE * limit))
        self._held: dict[str, int] = {}
        self.total = 0

    def amount(self, client: str) -> int:
        """What a client holds."""
        return self._held.get(client, 0)

    def take(self, client: str, amount: int) -> None:
        """Take an amount; raises RequestError: over_share for a client that holds more than its share, else
        queue_full."""
        held = self._held.get(client, 0)
        total = self.total + amount
        if total > self.limit if held == self.total else held + amount > self.most - total:
            clients = len(self._held) + (held == 0)
            share = self.limit // clients
            if clients > 1 and held + amount > share:
                raise RequestError(
                    f"over your share: {held} of your {self._what} are in flight, and {amount} more would "
                    f"exceed {share} while {clients} clients are served; send fewer at a time",
                    cause="over_share",
                    retry_after_s=self._retry_after_s(),
                )
            raise RequestError(
                f"overloaded: {self.total} {self._what} are in flight, at most {self.limit} are allowed",
                cause="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        self._held[client] = held + amount
        self.total += amount

    def give_back(self, client: str, amount: int) -> None:
        """Give back what was taken."""
        self.total -= amount
        left = self._held[client] - amount
        if left:
            self._held[client] = left
        else:
            del self._held[client]
