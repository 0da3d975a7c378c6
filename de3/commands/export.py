"""`de3 export` and `de3 calibrate`, which publish a version of a model in a store."""

from pathlib import Path
from typing import Annotated, Any

import typer

from de3.commands.models import StoreOption
from de3.commands.options import (
    Flag,
    Fragments,
    GroupColumn,
    MaxInt8Loss,
    MaxLoss,
    Quantize,
    add_parameters,
    check_groups,
    check_imported,
    fields_of,
    need_extra,
    say,
    say_published,
)
from de3.data import tables
from de3.data.tables import Columns
from de3.exits.signals import SIGNALS


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint from de3 train; with --full-depth also the folder of an artifact."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model in the store; required without --full-depth.")
    ] = None,
    store: StoreOption = Path("models"),
    quantize: Quantize = "int8",
    max_loss: MaxLoss = 1.0,
    max_int8_loss: MaxInt8Loss = 1.0,
    full_depth: Annotated[
        Path | None, typer.Option(help="Write one plain ONNX graph without exits to this new folder instead.")
    ] = None,
) -> None:
    """Export a checkpoint to ONNX segments with prototypes and calibration, as the model's next version.

    The segments are compared with the PyTorch model, and nothing is published if they differ too much.
    With --full-depth, one plain ONNX graph is written instead, for other servers; in int8 the graph uses ONNX Runtime's
    fused operators, with one scale for all activations of a text.

    Example: de3 export runs/sst2 --name sst2 --quantize int8
    """
    if full_depth is not None:
        from de3.export.full_depth import export_full_depth
        from de3.model_store.architecture import precision_of

        export_full_depth(checkpoint, full_depth, precision_of(quantize) == "int8")
        say(f"wrote {full_depth / 'model.onnx'}: no exits, {quantize}")
        return
    if name is None:
        raise ValueError("--name is required: the model's name in the store")
    from de3.export.exporter import ExportSettings
    from de3.export.exporter import export as run
    from de3.model_store.store import Store

    settings = ExportSettings(name, quantize, max_loss / 100, max_int8_loss / 100)
    need_extra("train")
    path = run(checkpoint, Store(store), settings)
    say_published(path, store, with_size=True)


@add_parameters(Columns, without=["label"])
def calibrate(
    model: Annotated[str, typer.Argument(help="Model in the store, as name or name:version.")],
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled texts like those to be served: .txt with one text per line, .csv, .tsv or .jsonl."
        ),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --texts, with --certify: labelled samples for fitting and choosing the signal, as jsonl "
            'with "text" (and "text_pair") and "label".'
        ),
    ] = None,
    certify: Annotated[
        Path | None,
        typer.Option(help="Further labelled samples, for the reported numbers and the guarantees."),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            help="Instead of --texts: records of live traffic, from the state folders of servers with --audit-share or "
            "--learn (learned/*.records); repeat for several replicas."
        ),
    ] = None,
    group_column: GroupColumn = None,
    fragments: Fragments = False,
    store: StoreOption = Path("models"),
    max_loss: Annotated[
        float,
        typer.Option(
            help="Accuracy that the default τ may lose against full depth, in percentage points; without "
            "labels: agreement with full depth.",
        ),
    ] = 1.0,
    signal: Annotated[
        str,
        typer.Option(
            help=f"Default signal, which is compared with τ: {', '.join(SIGNALS)}; or auto: risk, unless "
            "another is clearly faster on the tuning samples. Requests may name another.",
        ),
    ] = "auto",
    flag: Flag = None,
    **options: Any,
) -> None:
    """Recalibrate a model, for example on your own traffic: its next version gets a new signal, τ and guarantees.

    A model that was exported without the risk signal gets it. Without labels, the answers of full depth count as
    correct.

    Example: de3 calibrate sst2 --texts traffic.txt
    """
    if (texts is not None) + bool(records) + (tune is not None or certify is not None) != 1:
        raise ValueError("give one of --texts, --records, and --tune with --certify")
    if texts is None and (fragments or group_column is not None):
        raise ValueError(
            '--fragments, --group-column: need --texts; give "fragment" and "group" in --tune and --certify instead'
        )
    check_groups(fragments, group_column)
    from de3.data.examples import Example
    from de3.export.recalibrate import recalibrate, recalibrate_on_records, recalibrate_on_texts
    from de3.model_store.store import Store

    models = Store(store)
    check_imported(model, store, flag)
    if records:
        path = recalibrate_on_records(models.open(model), models, records, max_loss / 100, signal, flag)
    elif texts is not None:
        columns = Columns(**fields_of(Columns, options), label=None)
        rows = tables.read_rows(texts, columns)
        groups: list[Any] = [None] * len(rows)
        if group_column is not None:
            groups = tables.read_groups(tables.records(texts, columns), group_column)
        examples = [Example(text, 0, group) for (text, _), group in zip(rows, groups, strict=True)]
        artifact = models.open(model)
        path = recalibrate_on_texts(
            artifact, models, examples, texts, max_loss / 100, signal, fragments, flag
        )
    else:
        if tune is None or certify is None:
            raise ValueError(f"{'--tune' if tune is None else '--certify'} is required, too")
        path = recalibrate(models.open(model), models, tune, certify, max_loss / 100, signal, flag)
    say_published(path, store)
