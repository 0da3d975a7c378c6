"""DE3: the command line over the rooms `training`, `export`, `model_store` and `server`."""

from importlib.metadata import version

__version__ = version("de3")
