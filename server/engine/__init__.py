"""The engine: runs requests, independent of protocols."""
