"""Fair shares of a limited resource: texts in flight, or body bytes in flight."""

from collections.abc import Callable

from de3.runtime.errors import RequestError

SPARE = 1 / 8  # extra room for other clients when one holds the whole limit, as a share of the limit


class Shares:
    """A limited resource, shared between the clients that hold some of it.

    A client that is alone may hold the whole limit. Otherwise, no client may hold more than the amount that then
    remains free. So a new client that takes as much as it can leaves half of the free amount for the next one.

    Attributes:
        limit: largest amount that a lone client may hold.
        most: largest amount that all clients together may hold: the limit plus SPARE of it, at least 1 more.
        total: amount held by all clients.
    """

    def __init__(self, limit: int, what: str, retry_after_s: Callable[[], int] = lambda: 1) -> None:
        """what: the unit, for error messages. retry_after_s: seconds after which a rejected request may succeed."""
        self.limit, self._what, self._retry_after_s = limit, what, retry_after_s
        self.most = limit + max(1, int(SPARE * limit))
        self._held: dict[str, int] = {}
        self.total = 0

    def amount(self, client: str) -> int:
        """The amount that a client holds."""
        return self._held.get(client, 0)

    def take(self, client: str, amount: int) -> None:
        """Take an amount for a client; raises RequestError if it is too large.

        The cause is over_share if there are several clients and this one would hold more than an equal share of the
        limit, else queue_full.
        """
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
                f"overloaded: {self.total} {self._what} are in flight; at most {self.limit} are allowed",
                cause="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        self._held[client] = held + amount
        self.total += amount

    def release(self, client: str, amount: int) -> None:
        """Return an amount that was taken."""
        self.total -= amount
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]
