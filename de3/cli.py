"""The `de3` command. Each command imports its dependencies when it runs, so serving needs no torch."""

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from de3.classify import classify
from de3.importing import import_model
from de3.models import StoreOption
from de3.models import app as models_app
from de3.options import (
    DATA,
    MODEL,
    TRAINING,
    Dataset,
    DatasetSplit,
    Delimiter,
    File,
    Header,
    LabelColumn,
    LabelNames,
    PairColumn,
    Quotes,
    SignalOption,
    TextColumn,
    need_train_extra,
)
from de3.serve import serve
from loadtest.cli import app as loadtest_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train, export and serve text classifiers with early exit (DE3-BERT).",
    epilog="Typical order: de3 train → de3 evaluate → de3 export → de3 serve; with a classifier that you have: de3 "
    "import → de3 serve.",
)
app.add_typer(models_app, name="models")
app.add_typer(loadtest_app, name="loadtest")
console = Console(stderr=True)


def main() -> None:
    """Run the command line; an error that the user can fix is reported in one line, without a traceback."""
    from pydantic import ValidationError

    try:
        app()
    except ValidationError as error:  # a ValueError with one line per setting
        problems = (f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        _fail("; ".join(problems))
    except OSError as error:
        _fail(_reason(error))
    except ValueError as error:
        _fail(str(error))


def _reason(error: OSError) -> str:
    """The message of an OSError, without its number."""
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _say(message: str) -> None:
    """Print a line on stderr as it is: a command in it can be copied, and brackets are no markup."""
    console.print(message, markup=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    console.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(1)


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


def _exit_layers(exits: str, embedding_exit: bool, num_layers: int) -> list[int]:
    if exits == "last":
        return [num_layers]
    if exits == "all":
        return list(range(0 if embedding_exit else 1, num_layers + 1))
    try:
        return [int(layer) for layer in exits.split(",")]
    except ValueError:
        raise ValueError(f"--exits must be all, last or layers like 0,2,4,6; got {exits!r}") from None


def _read_rows(file: Path | None, dataset: str | None, split: str, columns: Any) -> list[Any]:
    from training import data

    if (file is None) == (dataset is None):
        raise ValueError("give the data either as a file or with --dataset")
    return data.read_rows(file, columns) if file else data.read_dataset(str(dataset), split, columns)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    encoder: Annotated[
        str,
        typer.Option(help="Folder or hub id of the encoder, e.g. bert-base-uncased.", rich_help_panel=MODEL),
    ],
    file: File = None,
    dataset: Dataset = None,
    split: DatasetSplit = "train",
    text_column: TextColumn = "text",
    pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    header: Header = True,
    quotes: Quotes = None,
    delimiter: Delimiter = None,
    label_names: LabelNames = None,
    held_back: Annotated[
        int | None,
        typer.Option(
            help="Number of samples in each of the two held-out parts (tune, certify). "
            "Default: a tenth each, at most 4000.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    fragments: Annotated[
        bool,
        typer.Option(
            help="The data contains fragments of its own texts (as SST-2's phrases): keep a text and its "
            "fragments in the same part.",
            rich_help_panel=DATA,
        ),
    ] = False,
    group_column: Annotated[
        str | None,
        typer.Option(
            help="Column of what rows are related by, e.g. document or user: rows of a group stay in the same part, "
            "and count as related in the guarantees.",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    exits: Annotated[
        str,
        typer.Option(
            help="Layers with an exit: all (1…M), last (a plain fine-tune), or a list like 0,2,4,6.",
            rich_help_panel=MODEL,
        ),
    ] = "all",
    embedding_exit: Annotated[
        bool, typer.Option(help="Add an exit on the embedding output, layer 0.", rich_help_panel=MODEL)
    ] = True,
    pooling: Annotated[
        str,
        typer.Option(
            help="Pooling of a layer's tokens: mean, or cls as in the paper.",
            rich_help_panel=MODEL,
        ),
    ] = "mean",
    metric_dim: Annotated[
        int | None,
        typer.Option(
            help="Width of the prototype space. Default: the encoder's hidden size.",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    last_prototypes: Annotated[
        bool, typer.Option(help="Add a prototype space at the last layer.", rich_help_panel=MODEL)
    ] = False,
    gamma: Annotated[
        float,
        typer.Option(min=0, max=1, help="γ, moving-average factor of the prototypes.", rich_help_panel=MODEL),
    ] = 0.01,
    alpha: Annotated[
        float, typer.Option(help="α, weight of the distance-aware loss.", rich_help_panel=TRAINING)
    ] = 0.1,
    weights: Annotated[
        str, typer.Option(help="Layer weights in the loss: depth or uniform.", rich_help_panel=TRAINING)
    ] = "depth",
    recipe: Annotated[
        str,
        typer.Option(
            help="Epochs, batch size, learning rate and patience: auto (by the number of samples; shown when "
            "training starts) or fixed (3 epochs, batches of 64, 5e-5). Each can be set by its own option.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the data.", show_default="by --recipe", rich_help_panel=TRAINING),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples a step.", show_default="by --recipe", rich_help_panel=TRAINING)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the encoder.", show_default="by --recipe", rich_help_panel=TRAINING
        ),
    ] = None,
    head_lr: Annotated[
        float, typer.Option(help="Learning rate of the exits' heads.", rich_help_panel=TRAINING)
    ] = 1e-3,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 0.01,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with learning-rate warm-up.", rich_help_panel=TRAINING)
    ] = 0.06,
    max_length: Annotated[
        int, typer.Option(help="Truncate training texts to this number of tokens.", rich_help_panel=TRAINING)
    ] = 128,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="A checkpoint to distil from, trained on the same data with the same seed.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    distill: Annotated[
        float,
        typer.Option(
            help="Share of the loss that uses the teacher's logits instead of the label.",
            rich_help_panel=TRAINING,
        ),
    ] = 0.5,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the distillation.", rich_help_panel=TRAINING)
    ] = 2.0,
    augment: Annotated[
        int,
        typer.Option(
            help="Number of altered copies of each sample (words replaced, texts joined), labelled by the teacher.",
            rich_help_panel=TRAINING,
        ),
    ] = 0,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many epochs without improvement; 0: never.",
            show_default="by --recipe",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    prototypes: Annotated[
        str,
        typer.Option(
            help="Final prototypes: refit (retrain the prototype spaces on the finished encoder), means (only "
            "recompute the prototypes over the training data) or sliding (keep the moving averages).",
            rich_help_panel=TRAINING,
        ),
    ] = "refit",
    bf16: Annotated[bool, typer.Option(help="Use bfloat16 autocast.", rich_help_panel=TRAINING)] = True,
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads and the order of samples.")] = 0,
    resume: Annotated[bool, typer.Option(help="Continue after the last complete epoch in --out.")] = False,
) -> None:
    """Train a DE3-BERT on labelled texts; writes the best epoch to --out.

    Two parts of the data, chosen by seed, are held out: tune.jsonl and certify.jsonl in --out.

    Example: de3 train data/train.tsv --text-column sentence --encoder bert-base-uncased --out runs/sst2
    """
    need_train_extra()
    import torch

    from training import checks, data
    from training import recipe as recipes
    from training.encoders import family
    from training.model import De3Model
    from training.progress import warn
    from training.split import split as split_examples
    from training.trainer import TrainSettings
    from training.trainer import train as run

    if fragments and group_column is not None:
        raise ValueError(
            "--group-column cannot go with --fragments, which makes groups of texts and their fragments"
        )
    columns = data.Columns(text_column, pair_column, label_column, header, quotes, delimiter)
    rows = _read_rows(file, dataset, split, columns)
    warnings = checks.labels(Counter(label for _, label in rows))
    rows = data.rename(rows, label_names)
    names = [name.strip() for name in label_names.split(",")] if label_names else data.label_order(rows)
    examples = data.to_examples(rows, names)
    if group_column is not None:
        groups = (
            data.read_column(file, columns, group_column)
            if file
            else data.read_dataset_column(str(dataset), split, group_column)
        )
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    encoder_config, tokenizer = checks.open_encoder(encoder)
    warnings += checks.unknown_tokens(tokenizer, examples)
    parts = split_examples(examples, seed, held_back, fragments)
    warnings += checks.held_out(parts, names)
    chosen = recipes.choose(recipe, len(parts.train), batch_size, epochs, lr, patience)
    settings = TrainSettings(
        **asdict(chosen),
        head_lr=head_lr,
        weight_decay=weight_decay,
        warmup=warmup,
        alpha=alpha,
        weights=weights,
        distill=distill,
        temperature=temperature,
        augment=augment,
        max_length=max_length,
        seed=seed,
        bf16=bf16,
        prototypes=prototypes,
    )
    _say(
        f"{len(parts.train)} samples to train, {len(parts.tune)} to tune, {len(parts.certify)} to certify; "
        f"labels: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
    )
    _say(f"recipe ({recipe}): {chosen}")
    warn(warnings)
    torch.manual_seed(seed)
    model = De3Model.from_encoder(
        encoder,
        names,
        exit_layers=_exit_layers(exits, embedding_exit, encoder_config.num_hidden_layers),
        pooling=pooling,
        metric_dim=metric_dim,
        last_prototypes=last_prototypes,
        gamma=gamma,
        max_tokens=min(tokenizer.model_max_length, family(encoder_config).max_tokens(encoder_config)),
        input=data.input_of(examples),
    )
    command = shlex.join(["de3", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    try:
        run(model, tokenizer, parts, settings, out, teacher, resume, command)
    except KeyboardInterrupt:
        _say(f"interrupted; go on after the last complete epoch with: {command}")
        sys.exit(130)
    if exits == "last":
        _say(f"saved to {out}. Next: de3 evaluate {out}, or use it as a --teacher")
    else:
        _say(f"saved to {out}. Next: de3 evaluate {out}, then de3 export {out} --name NAME")


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
        return [f"no plot was written ({_reason(error)}): name another file with --png"]
    _say(f"plot: {target}")
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


@app.command()
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
        rows = data.rename(_read_rows(file, dataset, split, columns), label_names)
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


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint of de3 train; with --full-depth also an artifact's folder."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in the store; required without --full-depth.", show_default=False
        ),
    ] = None,
    store: StoreOption = Path("models"),
    quantize: Annotated[str, typer.Option(help="int8, or none for fp32.")] = "int8",
    tune: Annotated[
        Path | None,
        typer.Option(
            help='Samples to fit and choose the signal on, as jsonl with "text" (and "text_pair") and "label". '
            "Default: the checkpoint's tune.jsonl.",
            show_default=False,
        ),
    ] = None,
    certify: Annotated[
        Path | None,
        typer.Option(
            help="Samples for the reported numbers. Default: the checkpoint's certify.jsonl.",
            show_default=False,
        ),
    ] = None,
    max_loss: Annotated[
        float,
        typer.Option(help="Accuracy that the default τ may lose against full depth, in percentage points."),
    ] = 1.0,
    max_int8_loss: Annotated[
        float, typer.Option(help="Accuracy that any exit may lose by int8, in percentage points.")
    ] = 1.0,
    signal: SignalOption = "auto",
    full_depth: Annotated[
        Path | None,
        typer.Option(
            help="Write one plain ONNX graph without exits to this new folder instead.", show_default=False
        ),
    ] = None,
) -> None:
    """Export a checkpoint to ONNX segments with prototypes and calibration, as the model's next version.

    The export is compared with the PyTorch model, and nothing is published if it differs too much.
    With --full-depth it writes one plain ONNX graph instead, for other servers.

    Example: de3 export runs/sst2 --name sst2 --quantize int8
    """
    need_train_extra()
    if full_depth is not None:
        from export.full_depth import export_full_depth

        if quantize not in ("int8", "none"):
            raise ValueError(f"--quantize must be int8 or none, got {quantize!r}")
        export_full_depth(checkpoint, full_depth, quantize == "int8")
        _say(f"wrote {full_depth / 'model.onnx'}: no exits, {quantize}")
        return
    if name is None:
        raise ValueError("--name is required: the model's name in the store")
    from export.exporter import ExportSettings
    from export.exporter import export as run
    from model_store.store import Store

    settings = ExportSettings(name, quantize, max_loss / 100, max_int8_loss / 100, signal)
    path = run(checkpoint, Store(store), settings, tune, certify)
    size = sum(f.stat().st_size for f in path.iterdir()) / 1e6
    _say(f"published {path} ({size:.1f} MB). Next: de3 serve --store {store}")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Model in the store, as name or name:version.")],
    tune: Annotated[
        Path,
        typer.Option(
            help='Samples to fit and choose the signal on, as jsonl with "text" (and "text_pair") and "label".'
        ),
    ],
    certify: Annotated[
        Path, typer.Option(help="Other samples, for the reported numbers and the guarantees.")
    ],
    store: StoreOption = Path("models"),
    max_loss: Annotated[
        float,
        typer.Option(help="Accuracy that the default τ may lose against full depth, in percentage points."),
    ] = 1.0,
    signal: SignalOption = "auto",
) -> None:
    """Recalibrate a model, for example on your own traffic: its next version gets a new signal, τ and guarantees.

    It also gives the signal risk to a model that was exported without it.

    Example: de3 calibrate sst2 --tune tune.jsonl --certify certify.jsonl
    """
    need_train_extra()
    from export.recalibrate import recalibrate
    from model_store.store import Store

    models = Store(store)
    path = recalibrate(models.open(model), models, tune, certify, max_loss / 100, signal)
    _say(f"published {path}. Next: de3 serve --store {store}")


app.command("import")(import_model)
app.command()(serve)
app.command()(classify)


if __name__ == "__main__":
    main()
