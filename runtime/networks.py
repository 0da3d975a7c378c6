"""Groups clients by network: an attacker can have many addresses, but rarely in many networks."""

import hashlib
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Network, ip_address, ip_network


@lru_cache(4096)
def network_of(client: str) -> str:
    """The /24 (IPv6: /48) network of a client's address; any other name is returned unchanged.

    client: an address or an IPv6 network, as `Frontend.client` returns it.
    """
    try:
        address = IPv6Network(client).network_address if "/" in client else ip_address(client)
    except ValueError:
        return client
    return str(ip_network((address, 24 if isinstance(address, IPv4Address) else 48), strict=False))


@lru_cache(4096)
def network_hash(client: str) -> str:
    """Hash of a client's network, saved to disk with the records of its texts."""
    return hashlib.blake2b(network_of(client).encode(), digest_size=8).hexdigest()
