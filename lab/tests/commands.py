"""The commands of the laboratory, run in this process as `python -m lab` runs them."""

from lab.cli import app
from tests.commands import invoke, output_of


def lab(arguments: str) -> str:
    """The output of a laboratory command; raises its error if it fails."""
    return output_of(invoke(arguments, app))
