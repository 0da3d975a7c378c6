"""The HTTP server: requests in, one engine thread for each core, answers out."""
