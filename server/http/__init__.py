"""The HTTP side: connections, protocols, keys and what reports on requests."""
