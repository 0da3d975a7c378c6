"""Identifies clients that have no API key."""

from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import Scope


class Clients:
    """Identifies clients without an API key by their address.

    An IPv6 client is identified by its /64 network, because a single host can use every address in it. All clients
    behind a proxy have the proxy's address, unless the proxy is trusted: then the client is the last address in
    X-Forwarded-For that is not a trusted proxy's.
    """

    def __init__(self, trusted: list[str]) -> None:
        """trusted: networks of trusted proxies, such as 10.0.0.0/8."""
        self._trusted = [ip_network(network) for network in trusted]
        self._name = lru_cache(4096)(self._find_name)

    def name(self, scope: Scope) -> str:
        """The client's address or network.

        Empty if the connection has no address, as behind Ray; "unknown" if the address is not an IP address.
        """
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
        """The name of the client with this address, and whether it is a trusted proxy."""
        try:
            ip = ip_address(address)
        except ValueError:  # a Unix socket, or an invalid header
            return "unknown", False
        if isinstance(ip, IPv6Address) and ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        is_trusted = any(ip in network for network in self._trusted)
        if isinstance(ip, IPv6Address):
            return str(IPv6Network((int(ip) >> 64 << 64, 64))), is_trusted
        return str(ip), is_trusted
