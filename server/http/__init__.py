"""The HTTP layer: connections, protocols, keys, and reports on requests."""
