"""`de3 evaluate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from de3.options import (
    Dataset,
    DatasetSplit,
    Delimiter,
    File,
    Header,
    LabelColumn,
    LabelNames,
    PairColumn,
    Quotes,
    TextColumn,
    need_train_extra,
    read_rows,
    reason,
    say,
)


def evaluate(
    model: Annotated[
        Path, typer.Argument(help="A checkpoint or an artifact's folder, <store>/<name>/<version>.")
    ],
    file: File = None,
    dataset: Dataset = None,
    split: DatasetSplit = "test",
    text_column: TextColumn = "text",
    pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    header: Header = True,
    quotes: Quotes = None,
    delimiter: Delimiter = None,
    label_names: LabelNames = None,
    lambdas: Annotated[str, typer.Option(help="Values of λ for EDR.")] = "0.5,1,2,4,8",
    png: Annotated[
        Path | None,
        typer.Option(
            help="File of the plot. Default: evaluation.png in the checkpoint, or evaluation-VERSION.png beside "
            "the artifact.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Report the accuracy of every exit, and accuracy against speed-up for each exit signal.

    Without data it uses certify.jsonl, which training held out. An artifact runs through its ONNX segments, as
    it does when serving, and its default τ is evaluated too.

    Example: de3 evaluate runs/sst2 data/dev.tsv --text-column sentence --label-names negative,positive
    """
    need_train_extra()
    from training import data
    from training import evaluate as evaluation
    from training.progress import warn

    lams = _lambdas(lambdas)
    is_artifact = (model / "manifest.json").exists()
    if is_artifact:
        from export.record import record, start_layers
        from model_store.model import Model
        from model_store.store import Store

        model = model.resolve()
        opened = Model(Store(model.parent.parent).open_path(model))
        names = opened.manifest.labels
    else:
        from training.checkpoint import Checkpoint
        from training.predict import predict

        checkpoint = Checkpoint(model)
        names = checkpoint.names
    if file is None and dataset is None:
        if is_artifact:
            raise ValueError(f"give the data: {model} holds no samples, as a checkpoint of de3 train does")
        examples = checkpoint.held_out("certify")
    else:
        columns = data.Columns(text_column, pair_column, label_column, header, quotes, delimiter)
        rows = data.rename(read_rows(file, dataset, split, columns), label_names)
        examples = data.to_examples(rows, names)
    takes = opened.manifest.input if is_artifact else checkpoint.config.input
    data.check_input(examples, takes, str(file or dataset or model))
    if is_artifact:
        recorded = record(opened, examples)
    else:
        encoded = data.encode(examples, checkpoint.tokenizer, checkpoint.config.max_tokens)
        recorded = predict(checkpoint.model, encoded, checkpoint.tokenizer.pad_token_id)
    risk = opened.manifest.signal("risk") if is_artifact and opened.manifest.risk is not None else None
    curves = evaluation.curves(recorded, lams, risk)
    output = Console()
    output.print(evaluation.exit_table(recorded))
    warn(evaluation.weaknesses(recorded, names))
    if len(recorded.exit_layers) > 1:
        output.print(evaluation.curve_table(curves))
        if is_artifact:
            _report_artifact(opened.manifest, recorded, start_layers(opened, examples), output)
        beside = model.parent / f"evaluation-{model.name}.png" if is_artifact else model / "evaluation.png"
        title = f"{opened.full_name if is_artifact else model.name}, {len(examples)} samples"
        warn(_plot(lambda target: evaluation.plot(recorded, curves, target, title), png, beside))


def _lambdas(values: str) -> list[float]:
    """The values of --lambdas; raises ValueError."""
    from exits.signals import signal_of

    try:
        return [signal_of("edr", float(value)).lam or 0.0 for value in values.split(",")]
    except ValueError as error:
        raise ValueError(f"--lambdas must be numbers like 0.5,1,2; got {values!r} ({error})") from None


def _plot(plot: Callable[[Path], None], png: Path | None, default: Path) -> list[str]:
    """Plot to the file that was named, or to the default, where a store that is read-only is but a warning."""
    target = png or default
    try:
        plot(target)
    except OSError as error:
        if png is not None:
            raise
        return [f"no plot was written ({reason(error)}): name another file with --png"]
    say(f"plot: {target}")
    return []


def _report_artifact(manifest: Any, recorded: Any, start_layers: float, output: Console) -> None:
    """Print what an artifact's default and targets give on recorded samples, and on short and long ones."""
    from exits.trade_offs import TradeOffs
    from training import evaluate as evaluation
    from training.progress import warn

    tau, signal, calibration = manifest.defaults.tau, manifest.default_signal, manifest.calibration
    output.print(evaluation.default_line(recorded, tau, signal, start_layers), highlight=False)
    output.print(evaluation.length_table(recorded, tau, signal, start_layers))
    if calibration is None:
        return
    certified = [(manifest.signal(*key), TradeOffs(rows)) for key, rows in manifest.trade_offs().items()]
    output.print(evaluation.target_table(recorded, certified, start_layers))
    warn(evaluation.unlike_lengths(recorded.tokens, calibration.tokens))
