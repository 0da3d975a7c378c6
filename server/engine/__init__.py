"""The engine: runs requests. It knows no protocol."""
