"""DE3: the command line over the rooms `training`, `export`, `model_store`, `server` and `loadtest`."""

from importlib.metadata import version

__version__ = version("de3")
