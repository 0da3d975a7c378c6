"""Who holds how much of what is limited: texts in flight, bytes of bodies in flight."""

from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope

from server.errors import ApiError

Network = IPv4Network | IPv6Network
# Beyond the limit there is so much for others than a client that holds all of it.
SPARE = 1 / 8


class Shares:
    """A limited amount, shared between those who use it now.

    A client that is alone may hold the limit. Otherwise nobody may hold more than would then be left for the
    others: each client that takes what it can leaves half of what it found, so that the next one finds
    something.

    Attributes:
        limit: what a client may hold if it is alone.
        most: all there is.
        total: what is held.
    """

    def __init__(self, limit: int, what: str, wait_s: Callable[[], int] = lambda: 1) -> None:
        """what: the unit, for messages. wait_s: seconds after which to try again, for a refusal."""
        self.limit, self._what, self._wait_s = limit, what, wait_s
        self.most = limit + max(1, int(SPARE * limit))
        self._held: dict[str, int] = {}
        self.total = 0

    def held(self, client: str) -> int:
        """What a client holds."""
        return self._held.get(client, 0)

    def take(self, client: str, amount: int) -> None:
        """Take an amount; raises ApiError 429 for a client that holds more than its fair share, else 503."""
        held = self._held.get(client, 0)
        total = self.total + amount
        if total > self.limit if held == self.total else held + amount > self.most - total:
            clients = len(self._held) + (held == 0)
            share = self.limit // clients
            if clients > 1 and held + amount > share:
                raise ApiError(
                    429,
                    f"over your share: {held} of your {self._what} are in flight, and {amount} more would "
                    f"exceed {share} while {clients} clients are served; send fewer at a time",
                    cause="over_share",
                    retry_after=self._wait_s(),
                )
            raise ApiError(
                503,
                f"overloaded: {self.total} {self._what} are in flight, at most {self.limit} are allowed",
                cause="queue_full",
                retry_after=self._wait_s(),
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


class Clients:
    """Tells clients without an API key apart, by address.

    An IPv6 client is its /64 network, as a single host has that many addresses. Behind a proxy everybody has
    the proxy's address, unless the proxy is trusted: then the client is the last address in X-Forwarded-For
    that is not a trusted proxy's.
    """

    def __init__(self, trusted: list[str]) -> None:
        """trusted: networks of proxies, as in 10.0.0.0/8. Raises ValueError."""
        try:
            self._trusted = [ip_network(network) for network in trusted]
        except ValueError as error:
            raise ValueError(f"trusted_proxies: {error}; say for example 10.0.0.0/8") from None
        self._name = lru_cache(4096)(self._find_name)

    def name(self, scope: Scope) -> str:
        """The client's address or network; empty where the connection has none, as behind Ray."""
        peer = scope.get("client")
        if not peer:
            return ""
        name, is_trusted = self._name(peer[0])
        if is_trusted:
            sent = [value for header, value in scope["headers"] if header == b"x-forwarded-for"]
            for address in reversed(b",".join(sent).decode("latin-1").split(",")):
                if not address.strip():
                    continue
                name, is_trusted = self._name(address.strip()[:64])
                if not is_trusted:
                    break
        return name

    def _find_name(self, address: str) -> tuple[str, bool]:
        """A client's name by its address, and whether it is a trusted proxy."""
        try:
            ip = ip_address(address)
        except ValueError:  # a socket in the file system, or nonsense in a header
            return "unknown", False
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        is_trusted = any(ip in network for network in self._trusted)
        if isinstance(ip, IPv6Address):
            return str(IPv6Network((int(ip) >> 64 << 64, 64))), is_trusted
        return str(ip), is_trusted
