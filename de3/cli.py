"""The `de3` command. Each command imports its dependencies when it runs, so serving needs no PyTorch."""

import os
import re
import sys
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from de3.commands.classify import classify
from de3.commands.deploy import deploy
from de3.commands.evaluate import evaluate
from de3.commands.export import calibrate, export
from de3.commands.fit import fit
from de3.commands.importing import import_model
from de3.commands.models import app as models_app
from de3.commands.options import ShortHelp, console, reason
from de3.commands.serve import serve
from de3.commands.train import train
from de3.loadtest.cli import app as loadtest_app

UsageError: Any = typer.BadParameter.__base__  # of click, which typer may bundle
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Train, export and serve text classifiers with early exit (DE3-BERT).",
    epilog="From a table of texts and labels: de3 fit → de3 serve. From a classifier: de3 import → de3 serve. For the "
    "best accuracy: de3 train → de3 evaluate → de3 export → de3 serve.",
)
app.add_typer(models_app, name="models")
app.add_typer(loadtest_app, name="loadtest")


def main(commands: typer.Typer | None = None) -> None:
    """Run the command line; errors that the user can fix are reported in one line, without a traceback.

    commands: the commands to run; None: those of `de3`.
    """
    from pydantic import ValidationError

    is_json = _logs_json()
    try:
        code = (commands or app)(standalone_mode=not is_json)
    except UsageError as error:  # only if is_json; otherwise typer prints it
        _fail(error.format_message(), is_json, error.exit_code)
    except ValidationError as error:  # a ValueError with one line per setting
        problems = [
            (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()
        ]
        message = "; ".join(f"{where}: {message}" if where else message for where, message in problems)
        _fail(message, is_json)
    except OSError as error:
        _fail(reason(error), is_json)
    except ValueError as error:
        _fail(str(error), is_json)
    else:
        sys.exit(code)


def _logs_json() -> bool:
    """True for `de3 serve --log-format json`, whose output is one JSON object per line."""
    command = " ".join(sys.argv[1:])
    given = re.findall(r"--log-format[ =](\w+)", command) or [os.environ.get("DE3_LOG_FORMAT")]
    return command.startswith("serve") and given[-1] == "json"


def _fail(message: str, is_json: bool, code: int = 1) -> NoReturn:
    if is_json:
        from de3.server import logs

        logs.configure("json")
        logs.log.critical(message)
    else:
        console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"de3 {version('de3')}")
        raise typer.Exit


@app.callback()
def _commands(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


app.command(cls=ShortHelp)(fit)
app.command(cls=ShortHelp)(train)
app.command()(evaluate)
app.command()(export)
app.command()(calibrate)
app.command("import", cls=ShortHelp)(import_model)
app.command(cls=ShortHelp)(serve)
app.command()(classify)
app.command()(deploy)


if __name__ == "__main__":
    main()
