"""`de3 import`: add early exits to a stock classifier."""

import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from de3.commands.models import StoreOption
from de3.commands.options import (
    Flag,
    Fragments,
    GroupColumn,
    HelpAll,
    MaxInt8Loss,
    Quantize,
    Threshold,
    add_parameters,
    check_groups,
    fields_of,
    is_given,
    need_extra,
    say,
    say_published,
)
from de3.data.tables import Columns, data_option, read_groups, read_rows, records

RATE = 0.02  # disagreement rate at which the speed-up is reported
WITH_RECORDS = ("model", "name", "records_files", "store", "quantize")


@add_parameters(Columns, without=["label"])
def import_model(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or hub id of a transformers …ForSequenceClassification or …ForTokenClassification model."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the model in the store.")],
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Texts like those to be served: a .txt file with one text per line, or .csv, .tsv or .jsonl."
        ),
    ] = None,
    records_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--records",
            help="Instead of --texts: records of live traffic, from the state folders of servers that learn "
            "(learned/*.records); repeat for several replicas. Only --name, --store and --quantize then apply.",
        ),
    ] = None,
    store: StoreOption = Path("models"),
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for intermediate results, from which an interrupted run continues. Default: runs/NAME."
        ),
    ] = None,
    label: Annotated[
        str | None,
        data_option(
            "--label-column",
            help="Column of the correct labels (for a multi-label model, separated by |; for a regression model, "
            "numbers), to report accuracy. Default: none; accuracy is then agreement with the model's own answers.",
        ),
    ] = None,
    label_names: Annotated[
        str | None,
        data_option(
            help="New names for the model's labels, in the order of its logits, e.g. negative,positive."
        ),
    ] = None,
    multi_label: Annotated[
        bool, data_option(help="Import a multi-label model whose config.json does not state problem_type.")
    ] = False,
    threshold: Threshold = None,
    tolerance: Annotated[
        float | None,
        data_option(
            help="Required for a regression model (one output): the largest difference from full depth that counts as "
            "the same answer, in the model's units."
        ),
    ] = None,
    special_tokens: Annotated[
        bool,
        data_option(
            "--special-tokens",
            help="Special tokens in texts, such as [SEP], reach the model as such, for a classifier that was trained "
            "so. Without it, they are encoded as characters, as any text is.",
        ),
    ] = False,
    group_column: GroupColumn = None,
    fragments: Fragments = False,
    quantize: Quantize = "int8",
    max_int8_loss: MaxInt8Loss = 2.0,
    max_loss: Annotated[
        float,
        typer.Option(
            help="Accuracy that the default τ may lose against full depth, in percentage points; without labels: "
            "agreement with the model's own answers.",
        ),
    ] = 1.0,
    flag: Flag = None,
    _: HelpAll = False,
    **options: Any,
) -> None:
    """Add early exits to a stock classifier; its weights do not change.

    Full depth gives the same answers as before, except for the few that int8 changes. Exits are fitted to the
    model's own answers on unlabelled texts; the rate of disagreement is certified, on held-out texts or, with few,
    cross-fitted. Use texts that the model was not trained on: it is more confident on its training texts, so a
    certificate from them would not hold for other texts.

    Example: de3 import my-org/my-classifier --texts traffic.txt --name mine
    """
    need_extra("fit")
    if (texts is None) == (not records_files):
        raise ValueError("give either --texts or --records")
    if records_files:
        _check_records(context)
        _import_records(model, records_files, name, store, quantize)
        return
    assert texts is not None
    from de3.data.examples import Example
    from de3.exits.recorded import MAX_TOLERANCE, MIN_TOLERANCE
    from de3.export.classifier import Stock, describe
    from de3.export.exporter import ExportSettings
    from de3.export.importing import ImportSettings, import_classifier
    from de3.export.original import original_of
    from de3.model_store.store import Store
    from de3.progress import warn
    from de3.training import checks

    check_groups(fragments, group_column)
    if tolerance is not None and not MIN_TOLERANCE <= tolerance <= MAX_TOLERANCE:  # also rejects NaN
        raise ValueError(
            f"--tolerance must be from {MIN_TOLERANCE:g} to {MAX_TOLERANCE:g}, got {tolerance:g}"
        )
    settings = ExportSettings(name, quantize, max_loss / 100, max_int8_loss / 100, flag)
    folder = work or Path("runs") / name
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--work {folder}: is a file; give a folder (it need not exist)")
    given = None if label_names is None else [one.strip() for one in label_names.split(",")]
    how_described = partial(describe, label_names=given, multi_label=multi_label)
    with original_of(model, how_described) as source:
        stock = Stock.open(model, source, how_described, special_tokens)
        columns = Columns(
            **fields_of(Columns, options),
            label=label,
            multi_label=stock.description.kind == "labels",
            regression=stock.description.kind == "value",
        )
        rows = read_rows(texts, columns)
        groups = None if group_column is None else read_groups(records(texts, columns), group_column)
        tokenizer = Tokenizer.from_str(stock.tokenizer.decode())
        warn(checks.unknown_tokens(tokenizer, [Example(text, 0) for text, _ in rows]))
        if not special_tokens:
            warn(checks.special_tokens(tokenizer, [text for text, _ in rows]))
        how = ImportSettings(threshold, tolerance, label is not None, fragments)
        try:
            path = import_classifier(stock, rows, groups, folder, how, Store(store), settings)
        except KeyboardInterrupt:
            say(f"interrupted; continue with: {shlex.join(['de3', *sys.argv[1:]])}")
            sys.exit(130)
    if work is None:
        with suppress(OSError):  # it is not empty
            folder.parent.rmdir()
    say_published(path, store, with_size=True)


def _check_records(context: typer.Context) -> None:
    """Raise ValueError for an option that does not apply to records."""
    for parameter in context.command.params:
        if parameter.name not in WITH_RECORDS and is_given(context, str(parameter.name)):
            raise ValueError(f"{parameter.opts[0]}: cannot be combined with --records")


def _import_records(model: str, files: list[Path], name: str, store: Path, quantize: str) -> None:
    """Publish a model whose exits are fitted to records of live traffic."""
    from de3.export.exporter import ExportSettings
    from de3.export.learn import import_records
    from de3.library import artifact_of
    from de3.model_store.store import Store

    ExportSettings(name, quantize)  # validates both
    path = import_records(artifact_of(model, store, quantize), files, Store(store), name, RATE)
    say_published(path, store)
