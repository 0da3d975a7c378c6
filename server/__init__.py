"""The HTTP server and its engine, which by default has one thread per core."""
