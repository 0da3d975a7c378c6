"""`de3 evaluate`: accuracy by exit and against speed-up, for a checkpoint or an artifact."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from de3.commands.models import StoreOption
from de3.commands.options import (
    Dataset,
    File,
    LabelNames,
    add_parameters,
    check_imported,
    fields_of,
    need_extra,
    read_rows,
    reason,
    say,
)
from de3.data.tables import Columns, TextOrPair, data_option, labels_in

LAMBDAS = (0.5, 1.0, 2.0, 4.0, 8.0)  # values of λ in EDR's curves


@add_parameters(Columns)
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="The folder of a checkpoint or an artifact, or a model in the store, as name or name:version."
        ),
    ],
    file: File = None,
    dataset: Dataset = None,
    split: Annotated[str, data_option(help="Split of --dataset.")] = "test",
    label_names: LabelNames = None,
    store: StoreOption = Path("models"),
    original: Annotated[
        str | None,
        typer.Option(
            help="The original classifier of an imported model: disagreement is counted against its answers. With "
            '--label-column "" or a .txt file, its answers are also the labels.'
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="A model to compare with, e.g. an earlier version, as NAME:1; on the labels that both have."
        ),
    ] = None,
    flag: Annotated[
        str | None,
        typer.Option(
            help="What a guard is to find, as LABEL,LABEL@PROBABILITY: recall and false alarms by threshold."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Column whose values group the texts: also report the group whose answers differ most from full "
            "depth's.",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            help="File of the plot. Default: evaluation.png in the checkpoint, or evaluation-VERSION.png next to "
            "the artifact."
        ),
    ] = None,
    **options: Any,
) -> None:
    """Report the accuracy of every exit, and accuracy against speed-up for each exit signal.

    Without data, a checkpoint is evaluated on certify.jsonl, which training held out. An artifact runs as in serving,
    with the same kernels or ONNX Runtime, and its default τ is also evaluated: by length, and for the groups of texts
    (negated or not, by length, by label) whose answers differ most from full depth's.

    Example: de3 evaluate runs/sst2 data/dev.tsv --text-column sentence --label-names negative,positive
    """
    from de3.data.examples import check_input, rename, to_examples, with_original
    from de3.progress import warn
    from de3.training import evaluate as evaluation

    subject = _open(model, store)
    _check_options(subject, file is not None or dataset is not None, original, baseline, by)
    guard = flag and subject.guard(flag)
    other = None if baseline is None else _baseline(baseline, store, subject)
    if file is not None or dataset is not None:
        has_labels = original is None or not (options["label"] == "" or (file and file.suffix == ".txt"))
        columns = Columns(
            **fields_of(Columns, options),
            multi_label=subject.thresholds is not None,
            regression=subject.tolerance is not None,
        )
        columns = columns if has_labels else replace(columns, label=None)
        rows = read_rows(file, dataset, split, columns)
        if not (has_labels or columns.regression):
            rows = [(text, subject.names[0]) for text, _ in rows]  # replaced by the original's answers below
        elif not columns.regression:
            rows = rename(rows, label_names, columns.multi_label)
        if other is not None:
            rows = _shared(rows, subject, other)
        examples = to_examples(rows, subject.names, columns.multi_label, columns.regression)
        if original is not None:
            examples = _answered(original, examples, subject, has_labels)
    elif original is not None:
        raise ValueError("--original: needs a file or --dataset")
    elif subject.checkpoint is None:
        raise ValueError(
            f"give the data: {model} has no held-out samples, unlike a checkpoint from de3 train"
        )
    else:
        examples = subject.checkpoint.held_out("certify")
    check_input(examples, subject.input, str(file or dataset or model))
    recorded = with_original(subject.record(examples), examples)
    curves = evaluation.curves(recorded, LAMBDAS, subject.risk)
    output = Console()
    output.print(evaluation.exit_table(recorded))
    warn(evaluation.weaknesses(recorded, subject.names))
    if other is not None:
        _compare(subject, recorded, examples, other)
    subject.report_guard(recorded, guard, output)
    if len(recorded.exit_layers) > 1:
        output.print(evaluation.curve_table(curves))
        if subject.served is not None:
            groups = {} if by is None else {by: _column(file, dataset, split, columns, by)}
            _report_artifact(subject.served, recorded, examples, output, groups)
        title = f"{subject.title}, {len(examples)} samples"
        warn(_plot(lambda target: evaluation.plot(recorded, curves, target, title), png, subject.beside))


@dataclass(frozen=True)
class _Subject:
    """The checkpoint or artifact to evaluate.

    Attributes:
        names: the labels.
        input, thresholds, tolerance: see model_store.manifest.Manifest.
        record: runs examples and returns their recorded exits.
        risk: the artifact's risk signal; None: it has none.
        beside: default file of the plot.
        served: the loaded model of an artifact; None for a checkpoint.
        checkpoint: None for an artifact.
    """

    title: str
    names: Sequence[str]
    input: str | None
    thresholds: list[float] | None
    record: Callable[[list[Any]], Any]
    risk: Any
    beside: Path
    tolerance: float | None = None
    served: Any = None
    checkpoint: Any = None

    def default_exits(self, recorded: Any) -> Any:
        """The index of the exit of each recorded text at the default τ, (n,); a checkpoint's is the last."""
        import numpy as np

        from de3.exits.rule import exit_index

        if self.served is None:
            return np.full(len(recorded.labels), len(recorded.exit_layers) - 1)
        manifest = self.served.model.manifest
        return exit_index(manifest.default_signal.scores(recorded), manifest.defaults.tau)

    def guard(self, flag: str) -> Any:
        """A flag of the model; raises ValueError for a checkpoint, and for a flag that the model cannot have."""
        from de3.runtime.flags import guard_of

        if self.served is None:
            raise ValueError("--flag: needs a model in the store, not a checkpoint")
        return guard_of(flag, self.served.model.manifest)

    def report_guard(self, recorded: Any, guard: Any, output: Console) -> None:
        """Print recall and false alarms by threshold, if there is a flag; see export.guard_report.flag_table."""
        from de3.export.guard_report import flag_table
        from de3.runtime.flags import certified_flag, flag_of

        if guard is not None:
            manifest = self.served.model.manifest
            own = certified_flag(manifest)
            is_own = own is not None and flag_of(own, manifest, manifest.kind) == guard[1]
            missed = manifest.missed if is_own else None
            output.print(
                flag_table(recorded, guard[1], manifest.defaults.tau, manifest.default_signal, missed)
            )


def _open(name: str, store: Path) -> _Subject:
    """Open the checkpoint or artifact with a path or name; raises ValueError if it cannot be found or used."""
    from de3.model_store.store import Store

    path, artifact = Path(name), Store(store).find(name)
    if artifact is None:
        if not path.is_dir():
            check_imported(name, store)
            raise ValueError(
                f"{name}: no such checkpoint or artifact, and no such model in the store {store}"
            )
        from de3.training.checkpoint import Checkpoint

        checkpoint = Checkpoint(path)
        need_extra("train")
        from de3.training.encoded import encode
        from de3.training.predict import predict

        names, tokenizer, most = checkpoint.names, checkpoint.tokenizer, checkpoint.config.max_tokens

        def run(examples: list[Any]) -> Any:
            encoded = encode(examples, tokenizer, most, num_labels=len(names))
            return predict(checkpoint.model, encoded, tokenizer.pad_token_id)

        config, png = checkpoint.config, path / "evaluation.png"
        return _Subject(
            path.name, names, config.input, config.thresholds, run, None, png, checkpoint=checkpoint
        )
    from de3.export.record import record
    from de3.runtime.loading import load
    from de3.runtime.settings import RuntimeSettings

    served = load(artifact, RuntimeSettings())
    model, manifest = served.model, served.model.manifest
    return _Subject(
        model.full_name,
        manifest.labels,
        manifest.input,
        manifest.thresholds,
        lambda examples: record(model, examples),
        manifest.signal("risk") if manifest.risk is not None else None,
        artifact.path.parent / f"evaluation-{artifact.path.name}.png",
        tolerance=manifest.tolerance,
        served=served,
    )


def _check_options(
    subject: _Subject, has_data: bool, original: str | None, baseline: str | None, by: str | None
) -> None:
    """Raise ValueError for --baseline or --by where it does not apply."""
    if baseline is not None and (original is not None or not has_data):
        raise ValueError("--baseline: needs a file or --dataset with labels, without --original")
    if by is not None and (subject.served is None or baseline is not None or not has_data):
        raise ValueError("--by: needs a model in the store, and a file or --dataset, without --baseline")


def _answered(original: str, examples: list[Any], subject: _Subject, has_labels: bool) -> list[Any]:
    """Examples with the original classifier's answers, which replace the labels unless `has_labels`.

    Raises ValueError if the classifier's labels do not fit the model's.
    """
    from de3.data.examples import answered
    from de3.export.classifier import Stock
    from de3.export.importing import answers
    from de3.export.original import original_of

    names = list(subject.names)
    with original_of(original) as source:
        served = subject.served
        is_special = served is not None and served.model.manifest.special_tokens
        stock = Stock.open(original, source, special_tokens=is_special)
        theirs = stock.description.labels
        same = sorted(theirs) == sorted(names)  # otherwise the labels were renamed, in order
        if len(theirs) != len(names) or (same and theirs != names):
            raise ValueError(
                f"--original {original}: its labels are {theirs[:20]}, those of the model are {names[:20]}"
            )
        found = answers(stock, [e.text for e in examples], subject.thresholds, subject.tolerance)
    return answered(examples, found, has_labels)


def _baseline(name: str, store: Path, subject: _Subject) -> _Subject:
    """Open a model to compare with; raises ValueError if it is of another kind."""
    other = _open(name, store)
    if (subject.tolerance, other.tolerance) != (None, None):
        raise ValueError("--baseline: is for models with labels, not for regression models")
    if (subject.thresholds is None) != (other.thresholds is None):
        raise ValueError("--baseline: only one of the two is a multi-label model")
    return other


def _shared(
    rows: list[tuple[TextOrPair, str]], subject: _Subject, baseline: _Subject
) -> list[tuple[TextOrPair, str]]:
    """The rows whose labels both models have; says how many are left out.

    Raises ValueError if the models share fewer than two labels.
    """
    shared = set(subject.names) & set(baseline.names)
    if len(shared) < 2:
        raise ValueError(
            f"--baseline: {baseline.title} shares {len(shared)} labels with {subject.title}, not 2 or more"
        )
    kept = [row for row in rows if shared.issuperset(labels_in(row[1], subject.thresholds is not None))]
    if not kept:
        raise ValueError(f"--baseline: no row has a label that {baseline.title} and {subject.title} share")
    if len(kept) < len(rows):
        others = {*subject.names, *baseline.names} - shared
        shown = ", ".join(map(repr, sorted(others)[:20])) + (" …" if len(others) > 20 else "")
        say(
            f"{len(rows) - len(kept)} rows are left out, as only one model, or none, has their label: {shown}"
        )
    return kept


def _compare(subject: _Subject, recorded: Any, examples: list[Any], baseline: _Subject) -> None:
    """Print how a model's answers compare with a baseline's, for texts whose labels both models have."""
    from de3.data.examples import check_input, labels_of
    from de3.export.label_report import compare

    names = [name for name in subject.names if name in set(baseline.names)]
    own = [k for k, name in enumerate(subject.names) if name in set(names)]
    theirs = [list(baseline.names).index(name) for name in names]
    to = dict(zip(own, theirs, strict=True))
    is_multi = subject.thresholds is not None
    relabelled = [
        replace(e, label=tuple(sorted(to[k] for k in labels_of(e))) if is_multi else to[e.label])
        for e in examples
    ]
    check_input(relabelled, baseline.input, f"--baseline {baseline.title}")
    other = baseline.record(relabelled)
    compare(
        [(other, baseline.default_exits(other), theirs), (recorded, subject.default_exits(recorded), own)],
        names,
    )


def _plot(plot: Callable[[Path], None], png: Path | None, default: Path) -> list[str]:
    """Plot to `png`, or to `default` if it is None; returns warnings.

    If matplotlib is missing, prints how to get it. If `default` cannot be written, only warns; raises OSError if `png`
    cannot be written.
    """
    target = png or default
    try:
        plot(target)
    except ImportError as error:
        say(f"plot: skipped ({error}); to draw it: {sys.executable} -m pip install matplotlib")
        return []
    except OSError as error:
        if png is not None:
            raise
        return [f"no plot was written ({reason(error)}): name another file with --png"]
    say(f"plot: {target}")
    return []


def _column(file: Path | None, dataset: str | None, split: str, columns: Columns, name: str) -> list[str]:
    """The value of a column in each row of the data; raises ValueError if it is missing, null or blank."""
    from de3.data.tables import dataset_records, read_groups, records

    rows = records(file, columns) if file is not None else dataset_records(str(dataset), split)
    return read_groups(rows, name, "--by")


def _report_artifact(
    served: Any, recorded: Any, examples: list[Any], output: Console, groups: dict[str, list[str]]
) -> None:
    """Print an artifact's results on recorded samples at its default τ, overall, by text length and by group.

    If it has a calibration, also print its results at the calibration's targets, and at the best τ in hindsight.
    groups: further ways to group the texts; see export.group_report.
    """
    from de3.commands.timing import measure_times
    from de3.exits.trade_offs import TradeOffs
    from de3.export.group_report import group_table, groups_of
    from de3.progress import warn
    from de3.training import evaluate as evaluation

    manifest, times = served.model.manifest, measure_times(served, examples)
    tau, signal, calibration = manifest.defaults.tau, manifest.default_signal, manifest.calibration
    output.print(evaluation.default_line(recorded, tau, signal, times), highlight=False)
    output.print(evaluation.length_table(recorded, tau, signal, times))
    groups = groups_of(recorded, [e.text for e in examples], manifest.labels) | groups
    output.print(group_table(recorded, tau, signal, groups))
    if calibration is None:
        return
    certified = [(manifest.signal(*key), TradeOffs(rows)) for key, rows in manifest.trade_offs().items()]
    output.print(evaluation.target_table(recorded, certified, times))
    output.print(evaluation.hindsight_table(recorded, [signal for signal, _ in certified]))
    warn(evaluation.unlike_lengths(recorded.tokens, calibration.tokens))
