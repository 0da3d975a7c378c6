"""The HTTP server and its engine, which has one thread for each core."""
