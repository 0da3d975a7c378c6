"""The engine, which runs the requests of every protocol."""
