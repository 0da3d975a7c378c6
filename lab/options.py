"""Options of the laboratory's commands, and functions that open models and print results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from de3.extras import install
from de3.loadtest import report
from de3.model_store.model import Model
from de3.model_store.store import Store

Int8Model = Annotated[str, typer.Option(help="An int8 model, as name or name:version.")]
AuditShare = Annotated[float, typer.Option(help="Share of the texts that are audited.", min=0.001, max=1)]
LabelColumn = Annotated[str, typer.Option(help="Column of the correct labels, if there is one.")]
StartLayers = Annotated[
    float, typer.Option(help="Cost of tokenizer, embeddings and their exit, in layers.", min=0)
]
Core = Annotated[int, typer.Option(help="The core to run on.", min=0)]
Png = Annotated[Path | None, typer.Option("--png", help="Write a plot here.", show_default=False)]
Earlier = Annotated[
    list[Path] | None,
    typer.Option("--show", help="Show these results of --json without measuring; repeat for more."),
]


def open_model(store: Path, name: str) -> Model:
    """Open a model of a store with ONNX Runtime.

    Raises ValueError if the train extra, which the studies need, is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError(f"this command needs the train extra: {install('train')}") from None
    return Model(Store(store).open(name), "onnxruntime")


def show(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], json_file: Path | None = None, numbers: Any = None
) -> None:
    """Print a table, and write the numbers to a JSON file if one is given."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(str, row))
    report.show(table, 140)
    if json_file:
        report.write_json(json_file, numbers)
