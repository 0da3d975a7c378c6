"""Opens models and runs requests: what the library, bulk classification and the server share."""
