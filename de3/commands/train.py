"""`de3 train`, with its own options and those that Columns and TrainSettings define."""

import shlex
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from de3.commands.options import (
    Dataset,
    File,
    Fragments,
    GroupColumn,
    HelpAll,
    LabelNames,
    Threshold,
    add_parameters,
    check_groups,
    fields_of,
    is_given,
    need_extra,
    read_rows,
    say,
)
from de3.data.tables import Columns, TextOrPair, data_option, dataset_records, labels_in, read_groups, records
from de3.training.settings import MULTI_LABEL_HEAD_LR, Recipe, TrainSettings, training_option

SPLIT = "train"  # the split of --dataset
model_option = partial(typer.Option, rich_help_panel="Model")
# Options that do not apply to a multi-label model.
NO_TEACHER = ("teacher", "distill", "augment")


@add_parameters(Columns, TrainSettings)
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
    encoder: Annotated[str, typer.Option(help="Folder or hub id of the encoder, e.g. bert-base-uncased.")],
    file: File = None,
    dataset: Dataset = None,
    label_names: LabelNames = None,
    held_back: Annotated[
        int | None,
        data_option(
            help="Number of samples in each of the two held-out parts (tune, certify). "
            "Default: a tenth each, at most 4000."
        ),
    ] = None,
    rows: Annotated[
        int | None,
        data_option(
            min=1,
            help="Train on at most this many samples, chosen by seed. Default: all that are not held out.",
        ),
    ] = None,
    fragments: Fragments = False,
    group_column: GroupColumn = None,
    multi_label: Annotated[
        bool,
        data_option(help="A text has any number of labels: a list in .jsonl, or separated by | in a cell."),
    ] = False,
    threshold: Threshold = None,
    exits: Annotated[
        str,
        model_option(
            help="Layers with an exit: all (including layer 0, the embeddings), last (a plain fine-tune), or a list "
            "like 1,2,4,6."
        ),
    ] = "all",
    pooling: Annotated[
        str, model_option(help="Pooling of a layer's tokens: mean, or cls as in the paper.")
    ] = "mean",
    teacher: Annotated[
        Path | None,
        training_option(help="A checkpoint to distill from, trained on the same data with the same seed."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue after the last complete epoch in --out.")] = False,
    _: HelpAll = False,
    **options: Any,
) -> None:
    """Train a DE3-BERT on labelled texts; writes the best epoch to --out.

    Two parts of the data, chosen by seed, are held out: tune.jsonl and certify.jsonl in --out.

    Example: de3 train data/train.tsv --text-column sentence --encoder bert-base-uncased --out runs/sst2
    """
    need_extra("train")
    import torch

    from de3.data.examples import input_of
    from de3.data.split import split as split_examples
    from de3.model_store.families import family
    from de3.progress import warn
    from de3.training import checks, pretrained
    from de3.training.model import De3Model
    from de3.training.recipe import by_size
    from de3.training.trainer import train as run

    check_groups(fragments, group_column)
    _check_multi_label(context, multi_label)
    columns = Columns(**fields_of(Columns, options), multi_label=multi_label)
    read = read_rows(file, dataset, SPLIT, columns)
    examples, names, warnings = _labelled(read, label_names, multi_label)
    if group_column is not None:
        found = records(file, columns) if file else dataset_records(str(dataset), SPLIT)
        groups = read_groups(found, group_column)
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    encoder_config, tokenizer = pretrained.open_encoder(encoder)
    warnings += checks.unknown_tokens(tokenizer.backend_tokenizer, examples)
    parts = split_examples(examples, options["seed"], held_back, fragments)
    parts = replace(parts, train=parts.train[:rows])
    warnings += checks.held_out(parts, names)
    chosen = replace(by_size(len(parts.train)), **fields_of(Recipe, options))
    settings = TrainSettings(**{**fields_of(TrainSettings, options), **asdict(chosen)})
    if multi_label:
        settings = replace(settings, head_lr=MULTI_LABEL_HEAD_LR)
    say(
        f"{len(parts.train)} samples to train, {len(parts.tune)} to tune, {len(parts.certify)} to certify; "
        f"labels: {', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
    )
    if multi_label:
        say(f"{sum(e.label == () for e in examples)} of {len(examples)} texts have no label")
    say(f"recipe: {chosen}")
    warn(warnings)
    torch.manual_seed(settings.seed)
    described = encoder_config.to_dict()
    model = De3Model.from_encoder(
        encoder,
        names,
        exit_layers=_exit_layers(exits, encoder_config.num_hidden_layers),
        pooling=pooling,
        thresholds=[0.5 if threshold is None else threshold] * len(names) if multi_label else None,
        max_tokens=min(tokenizer.model_max_length, family(described).max_tokens(described)),
        input=input_of(examples),
    )
    command = shlex.join(["de3", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"])
    try:
        run(model, tokenizer, parts, settings, out, teacher, resume, command)
    except KeyboardInterrupt:
        say(f"interrupted; continue after the last complete epoch with: {command}")
        sys.exit(130)
    if exits == "last":
        teacher_too = "" if multi_label else ", or use it as a --teacher"
        say(f"saved to {out}. Next: de3 evaluate {out}{teacher_too}")
    else:
        say(
            f"saved to {out}. Next: de3 evaluate {out} (on the certifying samples, or on your own file), then "
            f"de3 export {out} --name NAME"
        )


def _labelled(
    rows: list[tuple[TextOrPair, str]], label_names: str | None, multi_label: bool
) -> tuple[list[Any], list[str], list[str]]:
    """The rows as examples, the names of the labels, and warnings about the labels.

    Raises ValueError for labels that a model cannot be trained on.
    """
    from de3.data.examples import label_order, rename, to_examples
    from de3.training import checks

    counts = Counter(label for _, cell in rows for label in labels_in(cell, multi_label))
    warnings = checks.labels(counts, len(rows) if multi_label else None)
    rows = rename(rows, label_names, multi_label)
    order = label_order(rows, multi_label)
    names = [name.strip() for name in label_names.split(",")] if label_names else order
    examples = to_examples(rows, names, multi_label)
    return examples, names, warnings + (checks.label_counts(examples) if multi_label else [])


def _check_multi_label(context: typer.Context, multi_label: bool) -> None:
    """Raise ValueError for options that do not fit the kind of model."""
    if not multi_label and is_given(context, "threshold"):
        raise ValueError("--threshold: only a multi-label model has thresholds; add --multi-label")
    for name in NO_TEACHER if multi_label else ():
        if is_given(context, name):
            raise ValueError(
                f"--{name} cannot be combined with --multi-label: distillation is for mutually exclusive labels"
            )


def _exit_layers(exits: str, num_layers: int) -> list[int]:
    if exits == "last":
        return [num_layers]
    if exits == "all":
        return list(range(num_layers + 1))
    try:
        return [int(layer) for layer in exits.split(",")]
    except ValueError:
        raise ValueError(f"--exits must be all, last or layers like 0,2,4,6; got {exits!r}") from None
