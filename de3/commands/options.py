"""Options and checks that several commands share."""

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import typer
from rich.console import Console
from typer.core import TyperCommand
from typer.models import OptionInfo

from de3.data import tables
from de3.data.tables import Columns, TextOrPair, data_option
from de3.extras import install

Command = TypeVar("Command", bound=Callable[..., Any])
console = Console(stderr=True)
EXTRAS = {
    "train": ("torch", "transformers"),
    "fit": ("scipy", "threadpoolctl"),
}  # modules that commands need, by extra

File = Annotated[Path | None, typer.Argument(help="A .tsv, .csv or .jsonl file.")]
Dataset = Annotated[
    str | None, data_option(help="Instead of a file: a Hugging Face data set, as name or name:config.")
]
Fragments = Annotated[
    bool,
    data_option(
        help="The data contains fragments of its own texts (such as SST-2's phrases): keep a text and its "
        "fragments in the same part."
    ),
]
GroupColumn = Annotated[
    str | None,
    data_option(
        help="Column that names the group of a row, e.g. document or user: rows of a group stay in the same part, and "
        "count as related in the guarantees."
    ),
]
Threshold = Annotated[
    float | None,
    data_option(
        min=0.01,
        max=0.99,
        help="For a multi-label model: the probability above which a label is assigned. Requests may set other "
        "thresholds.",
        show_default="0.5",
    ),
]

Flag = Annotated[
    str | None,
    typer.Option(
        help="What the model is to find, as LABEL,LABEL@PROBABILITY (see de3 serve --help). Also certifies max_missed: "
        "the share of the texts flagged at full depth that early exits miss. Needs such texts: at least 149 for 2%, 59 "
        "for 5%; with few texts, which are then cross-fitted, 194 and 77."
    ),
]
Quantize = Annotated[str, typer.Option(help="int8, or none for fp32.")]
MaxLoss = Annotated[
    float,
    typer.Option(help="Accuracy that the default τ may lose against full depth, in percentage points."),
]
MaxInt8Loss = Annotated[
    float, typer.Option(help="Accuracy that any exit may lose to int8, in percentage points.")
]
LabelNames = Annotated[
    str | None,
    data_option(
        help="New names for the data's labels, in their sorted order, e.g. negative,positive. "
        "Default: as in the data."
    ),
]


def add_parameters(
    *classes: type,
    without: Collection[str] = (),
    variable: Callable[[str], str] | None = None,
    order: Sequence[str] = (),
) -> Callable[[Command], Command]:
    """A decorator that replaces **options of a command with the fields of settings classes: pydantic or dataclasses.

    A field becomes a parameter if it is annotated with a typer.Option and not named in `without`. A field whose
    `show_default` is a string has the default None, because its value depends on other options.

    variable: the environment variable of a field. None: fields have none. order: the parameters with these names are
    last, in this order.
    """

    def decorate(command: Command) -> Command:
        own = signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not Parameter.VAR_KEYWORD]
        for field in [field for each in classes for field in signature(each).parameters.values()]:
            match get_args(field.annotation):
                case [kind, *_, OptionInfo() as info] if field.name not in without:
                    if get_origin(kind) is list:
                        kind = list[str]  # typer accepts no annotated items
                    if variable is not None:
                        info.envvar = variable(field.name)
                    option = field.replace(kind=Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info])
                    if isinstance(info.show_default, str):
                        option = option.replace(annotation=Annotated[kind | None, info], default=None)
                    parameters.append(option)
        parameters.sort(key=lambda each: order.index(each.name) if each.name in order else -1)
        # typer reads options from the signature and the annotations
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


class ShortHelp(TyperCommand):
    """A command whose --help omits grouped options and environment variables; the parameter HelpAll shows them."""

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, **fields)
        groups = dict.fromkeys(group for each in self.params if (group := vars(each)["rich_help_panel"]))
        self.params.sort(key=lambda each: "--help-all" in each.opts)  # the last one
        self.epilog = f"More options, shown by --help-all: {', '.join(groups)}."
        for each in self.params:
            vars(each).update(show_envvar=False, hidden=vars(each)["rich_help_panel"] is not None)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.command.epilog = None
        for each in context.command.params:
            vars(each).update(show_envvar=True, hidden=False)
        context.command.format_help(context, context.make_formatter())
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(
        "--help-all",
        is_eager=True,
        callback=_show_all,
        help="Show all options, with their environment variables.",
    ),
]


def fields_of(dataclass: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are fields of this dataclass and not None."""
    names = signature(dataclass).parameters
    return {name: value for name, value in options.items() if name in names and value is not None}


def need_extra(extra: str) -> None:
    """Raise ValueError unless the modules of an extra (a key of EXTRAS) are installed."""
    try:
        for module in EXTRAS[extra]:
            import_module(module)
    except ImportError as error:
        raise ValueError(f"this command needs the {extra} extra ({error}): {install(extra)}") from None


def read_rows(
    file: Path | None, dataset: str | None, split: str, columns: Columns
) -> list[tuple[TextOrPair, str]]:
    """The (text, label) rows of a file or a Hugging Face data set; raises ValueError unless exactly one is given."""
    if (file is None) == (dataset is None):
        raise ValueError("give the data either as a file or with --dataset")
    return tables.read_rows(file, columns) if file else tables.read_dataset(str(dataset), split, columns)


def check_groups(fragments: bool, group_column: str | None) -> None:
    """Raise ValueError if related rows are specified in two ways at once."""
    if fragments and group_column is not None:
        raise ValueError(
            "--group-column cannot be combined with --fragments, which makes groups of texts and their fragments"
        )


def is_given(context: typer.Context, parameter: str) -> bool:
    """True if a parameter of a command is set, on the command line or by an environment variable."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name != "DEFAULT"


def say_published(path: Path, store: Path, with_size: bool = False) -> None:
    """Print the folder of a published version, with its size if wanted, and the command that serves it."""
    size = f" ({sum(f.stat().st_size for f in path.iterdir()) / 1e6:.1f} MB)" if with_size else ""
    from de3.model_store.store import Store

    serve = f"de3 serve --model {path.parent.name}" + ("" if store == Path("models") else f" --store {store}")
    if (missed := Store(store).open_path(path).manifest.missed) is not None:  # a guard
        serve += " --guarantee-missed 0.02" if missed.limit is None else f" --max-missed {missed.limit:g}"
    old = (
        ""
        if path.name == "1"
        else "; servers that run keep their version until they load this one or restart"
    )
    name, pinned = path.parent.name, Store(store).pin(path.parent.name)
    if pinned is not None:  # a start does not serve it
        old, serve = f"; {name} stays pinned to version {pinned}", f"de3 models load {name}:{path.name}"
    say(f"published {path}{size}{old}. Next: {serve}")


def check_imported(name: str, store: Path, flag: str | None = None) -> None:
    """Raise ValueError for a hub id or folder that is not in a store; the message says how to import the classifier.

    flag: of a guard.
    """
    from de3.model_store.store import Store

    if (Path(name).is_dir() or "/" in name) and Store(store).find(name) is None:
        command = ["de3", "import", name, "--texts", "FILE", "--name", "NAME"]
        command += [] if flag is None else ["--flag", flag]
        raise ValueError(
            f"{name}: is not in the store {store}. To add exits to a classifier, and certify them: "
            f"{shlex.join(command)}"
        )


def say(message: str) -> None:
    """Print a line on stderr unchanged: not wrapped, so that commands can be copied, and without markup."""
    console.print(message, markup=False, soft_wrap=True)


def reason(error: OSError) -> str:
    """The message of an OSError, without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
