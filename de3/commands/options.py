"""What several commands share: their options, and the check for PyTorch."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from de3.exits.signals import SIGNALS

console = Console(stderr=True)

DATA = "Data"
MODEL = "Model"
TRAINING = "Training"

File = Annotated[Path | None, typer.Argument(help="A .tsv, .csv or .jsonl file.", show_default=False)]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Instead of a file: a Hugging Face data set, as name or name:config.", rich_help_panel=DATA
    ),
]
DatasetSplit = Annotated[str, typer.Option("--split", help="Split of --dataset.", rich_help_panel=DATA)]
TextColumn = Annotated[
    str, typer.Option(help="Column of the text (with --no-header a number from 0).", rich_help_panel=DATA)
]
PairColumn = Annotated[
    str | None, typer.Option(help="Column of the second text, for pairs.", rich_help_panel=DATA)
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.", rich_help_panel=DATA)]
Header = Annotated[bool, typer.Option(help="Whether the first row names the columns.", rich_help_panel=DATA)]
Delimiter = Annotated[
    str | None,
    typer.Option(
        help="Character between fields, or tab, for files of any name. Default: by .csv, .tsv or .jsonl.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Quotes = Annotated[
    bool | None,
    typer.Option(
        help="Whether quotation marks delimit fields. Default: no in .tsv, else yes.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]

Fragments = Annotated[
    bool,
    typer.Option(
        help="The data contains fragments of its own texts (as SST-2's phrases): keep a text and its fragments in the "
        "same part.",
        rich_help_panel=DATA,
    ),
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of what rows are related by, e.g. document or user: rows of a group stay in the same part, and "
        "count as related in the guarantees.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        max=0.99,
        help="Of a multi-label model: the probability above which a label is given. Requests may set others.",
        show_default="0.5",
        rich_help_panel=DATA,
    ),
]

SignalOption = Annotated[
    str,
    typer.Option(
        help=f"Default signal, the score that is compared with τ: {', '.join(SIGNALS)}, or auto: the fastest on the "
        "tuning samples. Requests may name another.",
    ),
]

LabelNames = Annotated[
    str | None,
    typer.Option(
        help="New names of the data's labels in their sorted order, e.g. negative,positive. "
        "Default: as in the data.",
        show_default=False,
        rich_help_panel=DATA,
    ),
]


def need_train_extra() -> None:
    """Raise ValueError unless PyTorch and transformers are installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this command needs the train extra ({error}): pip install 'de3[train]'") from None


def read_rows(file: Path | None, dataset: str | None, split: str, columns: Any) -> list[Any]:
    """The (text, label) rows of a file or a Hugging Face data set; raises ValueError unless one of them is given."""
    from de3.training import data

    if (file is None) == (dataset is None):
        raise ValueError("give the data either as a file or with --dataset")
    return data.read_rows(file, columns) if file else data.read_dataset(str(dataset), split, columns)


def check_groups(fragments: bool, group_column: str | None) -> None:
    """Raise ValueError for two ways at once to say which rows are related."""
    if fragments and group_column is not None:
        raise ValueError(
            "--group-column cannot go with --fragments, which makes groups of texts and their fragments"
        )


def next_serve(store: Path, name: str) -> str:
    """The command that serves a model of a store."""
    return f"de3 serve --model {name}" + ("" if store == Path("models") else f" --store {store}")


def say(message: str) -> None:
    """Print a line on stderr as it is: a command in it can be copied, and brackets are no markup."""
    console.print(message, markup=False, soft_wrap=True)


def reason(error: OSError) -> str:
    """The message of an OSError, without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
