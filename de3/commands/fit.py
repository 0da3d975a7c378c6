"""`de3 fit`: a new classifier from a table of texts and labels."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from de3.commands.models import StoreOption
from de3.commands.options import (
    Dataset,
    File,
    GroupColumn,
    HelpAll,
    LabelNames,
    MaxLoss,
    Quantize,
    Threshold,
    add_parameters,
    fields_of,
    need_extra,
    read_rows,
    say_published,
)
from de3.data.tables import Columns, dataset_records, labels_in, read_groups, records

SPLIT = "train"  # the split of --dataset


@add_parameters(Columns)
def fit(
    encoder: Annotated[
        str,
        typer.Option(
            help="Folder or hub id of the encoder, preferably a sentence encoder such as "
            "sentence-transformers/all-MiniLM-L6-v2; or a model in the store."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the model in the store.")],
    file: File = None,
    dataset: Dataset = None,
    label_names: LabelNames = None,
    group_column: GroupColumn = None,
    threshold: Threshold = None,
    store: StoreOption = Path("models"),
    quantize: Quantize = "int8",
    max_loss: MaxLoss = 1.0,
    _: HelpAll = False,
    **options: Any,
) -> None:
    """Fit a classifier with early exits to a table of texts and labels, in minutes and without PyTorch.

    The encoder stays frozen: a logistic regression is fitted to the output of each layer. For topics and intents, this
    is nearly as accurate as fine-tuning; for sentiment it is not (use de3 train). A text may have several labels, which
    are separated by | in a cell, or are a list in .jsonl.

    Example: de3 fit intents.csv --encoder sentence-transformers/all-MiniLM-L6-v2 --name intents
    """
    need_extra("fit")
    from de3.data.examples import label_order, rename, to_examples
    from de3.export.encoder import encoder_of
    from de3.export.exporter import ExportSettings
    from de3.export.from_table import fit_table
    from de3.model_store.store import Store
    from de3.progress import warn
    from de3.training import checks

    settings = ExportSettings(name, quantize, max_loss / 100)
    columns = Columns(**fields_of(Columns, options), multi_label=True)
    rows = read_rows(file, dataset, SPLIT, columns)
    cells = [labels_in(cell, True) for _, cell in rows]
    is_multi = threshold is not None or any(len(labels) > 1 for labels in cells)
    if is_multi:
        threshold = 0.5 if threshold is None else threshold
    elif all(cells):
        rows = [(text, label) for (text, _), (label,) in zip(rows, cells, strict=True)]
    else:  # reads them again, for the error at the first row without a label
        columns = replace(columns, multi_label=False)
        rows = read_rows(file, dataset, SPLIT, columns)
    rows = rename(rows, label_names, is_multi)
    counts = Counter(label for _, cell in rows for label in labels_in(cell, is_multi))
    warn(checks.labels(counts, len(rows) if is_multi else None))
    names = label_order(rows, is_multi)
    examples = to_examples(rows, names, is_multi)
    if group_column is not None:
        found = records(file, columns) if file else dataset_records(str(dataset), SPLIT)
        groups = read_groups(found, group_column)
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    models = Store(store)
    with encoder_of(encoder, models, settings.precision) as (base, poolings):
        path = fit_table(base, poolings, examples, names, threshold, models, settings)
    say_published(path, store, with_size=True)
