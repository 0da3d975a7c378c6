"""The commands of `de3`, run in this process as a user types them."""

from typer import Typer
from typer.testing import CliRunner, Result

WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, transformers=None)
from de3.cli import main
main()
"""


def invoke(arguments: str | list[str], app: Typer | None = None, input: str = "") -> Result:
    """Run a command of `de3`, or of another app, on a terminal wide enough that no output line wraps.

    input: its standard input.
    """
    from de3.cli import app as de3_app

    words = arguments.split() if isinstance(arguments, str) else arguments
    return CliRunner().invoke(app or de3_app, words, input, env={"COLUMNS": "200"})


def output_of(result: Result) -> str:
    """The output of a command; raises the exception that it raised, or AssertionError if its exit code is not 0."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def de3(arguments: str | list[str]) -> str:
    """The output of a `de3` command; raises the same errors as `output_of`."""
    return output_of(invoke(arguments))


def refusal(arguments: str | list[str]) -> str:
    """The message of the ValueError with which a command rejects its arguments."""
    result = invoke(arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)
