"""The command line of DE3, on top of `training`, `export`, `model_store`, `server` and `loadtest`."""

from importlib.metadata import version

__version__ = version("de3")
