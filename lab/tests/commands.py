"""The commands of the laboratory, run in this process as `python -m lab` runs them."""

from lab.cli import app
from tests.commands import invoke, output_of


def lab(arguments: str) -> str:
    """What a command prints that succeeds; raises its error otherwise."""
    return output_of(invoke(arguments, app))
