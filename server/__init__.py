"""The HTTP server, whose models and engine are the runtime's."""
