"""Text classifiers that exit early: `de3.load` runs one in process, and `de3.client` calls a server."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from de3.client import Options
    from de3.library import DEMO, Classifier, Classifiers, InputError, load

    __version__: str

__all__ = ["DEMO", "Classifier", "Classifiers", "InputError", "Options", "__version__", "load"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the library when it is first used: `de3.client` alone needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'de3' has no attribute {name!r}")
    if name == "__version__":
        from importlib.metadata import version

        return version("de3")
    from de3 import library

    return getattr(library, name)
