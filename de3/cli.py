"""The `de3` command. Each command imports what it needs when it runs, so that serving needs no torch."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Text classifiers that exit early (DE3-BERT): train, export, serve.",
    epilog="Usual order: de3 train → de3 evaluate → de3 export → de3 serve.",
)
console = Console(stderr=True)

DATA = "Data"
MODEL = "Model"
TRAINING = "Training"


def main() -> None:
    """Run the command line; an error that the user can mend is one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False, markup=True)
        sys.exit(1)


@app.callback()
def _commands() -> None:
    pass


def _need_train_extra() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"this command needs the train extra ({error}): pip install 'de3[train]'") from None


def _exit_layers(exits: str, embedding_exit: bool, num_layers: int) -> list[int]:
    if exits == "last":
        return [num_layers]
    if exits == "all":
        return list(range(0 if embedding_exit else 1, num_layers + 1))
    try:
        return [int(x) for x in exits.split(",")]
    except ValueError:
        raise ValueError(f"--exits must be all, last or layers like 0,2,4,6; got {exits!r}") from None


def _rows(file: Path | None, dataset: str | None, split: str, columns: Any) -> list[Any]:
    from training import data

    if (file is None) == (dataset is None):
        raise ValueError("give the data as a file or with --dataset, one of the two")
    return data.read_rows(file, columns) if file else data.read_dataset(str(dataset), split, columns)


File = Annotated[Path | None, typer.Argument(help="A .tsv, .csv or .jsonl file.", show_default=False)]
Dataset = Annotated[
    str | None,
    typer.Option(help="Instead of a file: a Hugging Face data set, name or name:config.", rich_help_panel=DATA),
]
DatasetSplit = Annotated[str, typer.Option("--split", help="Split of --dataset.", rich_help_panel=DATA)]
TextColumn = Annotated[
    str, typer.Option(help="Column of the text (a number from 0 with --no-header).", rich_help_panel=DATA)
]
PairColumn = Annotated[
    str | None, typer.Option(help="Column of the second text of a pair.", rich_help_panel=DATA)
]
LabelColumn = Annotated[str, typer.Option(help="Column of the label.", rich_help_panel=DATA)]
Header = Annotated[bool, typer.Option(help="Whether the first row names the columns.", rich_help_panel=DATA)]
Quotes = Annotated[
    bool | None,
    typer.Option(
        help="Whether quotation marks delimit fields. [default: yes in .csv, no in .tsv]",
        show_default=False,
        rich_help_panel=DATA,
    ),
]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    encoder: Annotated[
        str, typer.Option(help="Folder or hub id of the encoder, e.g. bert-base-uncased.", rich_help_panel=MODEL)
    ],
    file: File = None,
    dataset: Dataset = None,
    split: DatasetSplit = "train",
    text_column: TextColumn = "text",
    pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    header: Header = True,
    quotes: Quotes = None,
    label_names: Annotated[
        str | None,
        typer.Option(
            help="Names for the labels in their sorted order, e.g. negative,positive. "
            "[default: as in the data]",
            show_default=False,
            rich_help_panel=DATA,
        ),
    ] = None,
    held_back: Annotated[
        int | None,
        typer.Option(
            help="Samples of each of the two parts that training never sees (tune, certify). "
            "[default: a tenth each, at most 4000]",
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
        bool, typer.Option(help="Also exit on the embedding output, layer 0.", rich_help_panel=MODEL)
    ] = True,
    pooling: Annotated[
        str,
        typer.Option(
            help="How a layer's tokens become one vector: mean, or cls as in the paper.", rich_help_panel=MODEL
        ),
    ] = "mean",
    metric_dim: Annotated[
        int | None,
        typer.Option(
            help="Width of the prototype space. [default: the encoder's]",
            show_default=False,
            rich_help_panel=MODEL,
        ),
    ] = None,
    last_prototypes: Annotated[
        bool, typer.Option(help="A prototype space at the last layer too.", rich_help_panel=MODEL)
    ] = False,
    gamma: Annotated[
        float, typer.Option(min=0, max=1, help="γ, sliding-average factor of the prototypes.", rich_help_panel=MODEL)
    ] = 0.01,
    alpha: Annotated[
        float, typer.Option(help="α, weight of the distance-aware loss.", rich_help_panel=TRAINING)
    ] = 0.1,
    weights: Annotated[
        str, typer.Option(help="Layer weights in the loss: depth or uniform.", rich_help_panel=TRAINING)
    ] = "depth",
    epochs: Annotated[int, typer.Option(rich_help_panel=TRAINING)] = 3,
    batch_size: Annotated[int, typer.Option(rich_help_panel=TRAINING)] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the encoder.", rich_help_panel=TRAINING)] = 5e-5,
    head_lr: Annotated[
        float, typer.Option(help="Learning rate of the exits' heads.", rich_help_panel=TRAINING)
    ] = 1e-3,
    weight_decay: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 0.01,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps with a rising learning rate.", rich_help_panel=TRAINING)
    ] = 0.06,
    max_length: Annotated[
        int, typer.Option(help="Cut training texts to so many tokens.", rich_help_panel=TRAINING)
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
        typer.Option(help="Share of the loss that follows the teacher, not the label.", rich_help_panel=TRAINING),
    ] = 0.5,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the distillation.", rich_help_panel=TRAINING)
    ] = 2.0,
    patience: Annotated[
        int,
        typer.Option(help="Stop after so many epochs without a better one; 0: never.", rich_help_panel=TRAINING),
    ] = 0,
    recompute_prototypes: Annotated[
        bool,
        typer.Option(help="At the end, recompute the prototypes over all of train.", rich_help_panel=TRAINING),
    ] = True,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.", rich_help_panel=TRAINING)] = True,
    seed: Annotated[int, typer.Option(help="Seed of the split, the heads and the order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on after the last whole epoch in --out.")] = False,
) -> None:
    """Train a DE3-BERT on labelled text; the best epoch lands in --out.

    Two parts of the data are kept back by seed and never trained on: tune.jsonl and certify.jsonl in --out.

    Example: de3 train data/train.tsv --text-column sentence --encoder bert-base-uncased --out runs/sst2
    """
    _need_train_extra()
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from training import data
    from training.model import De3Model
    from training.trainer import TrainSettings
    from training.trainer import train as run

    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        head_lr=head_lr,
        weight_decay=weight_decay,
        warmup=warmup,
        alpha=alpha,
        weights=weights,
        distill=distill,
        temperature=temperature,
        max_length=max_length,
        patience=patience,
        seed=seed,
        bf16=bf16,
        recompute_prototypes=recompute_prototypes,
    )
    rows = _rows(file, dataset, split, data.Columns(text_column, pair_column, label_column, header, quotes))
    order = data.label_order(rows)
    names = [x.strip() for x in label_names.split(",")] if label_names else order
    if len(names) != len(order) or len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"the data has the labels {order}; --label-names must name each once, got {names}")
    parts = data.split(data.to_examples(rows, order), seed, held_back)
    console.print(
        f"{len(parts.train)} samples to train, {len(parts.tune)} to tune, {len(parts.certify)} to certify; "
        f"labels: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
    )
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    num_layers = AutoConfig.from_pretrained(encoder).num_hidden_layers
    model = De3Model.from_encoder(
        encoder,
        names,
        exit_layers=_exit_layers(exits, embedding_exit, num_layers),
        pooling=pooling,
        metric_dim=metric_dim,
        last_prototypes=last_prototypes,
        gamma=gamma,
        max_tokens=512,
    )
    run(model, tokenizer, parts, settings, out, teacher, resume)
    console.print(f"saved to {out}. Next: de3 evaluate {out}, then de3 export {out}")


if __name__ == "__main__":
    main()
