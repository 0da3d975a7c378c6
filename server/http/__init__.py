"""The HTTP layer: connections, protocols, API keys, the request log and traces."""
