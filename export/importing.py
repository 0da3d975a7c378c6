"""Import of a stock classifier as an artifact with early exits; its weights do not change."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from de3.data.examples import (
    Example,
    Label,
    answered,
    input_of,
    label_array,
    label_of,
    to_examples,
    with_original,
)
from de3.data.split import Split, are_whole, groups_of, split
from de3.data.tables import TextOrPair, labels_in, pair_of
from de3.exits.calibration import Samples
from de3.exits.kinds import kind_of_text
from de3.exits.recorded import MIN_TOLERANCE
from de3.export import fit, states
from de3.export.calibrate import CalibrationPart
from de3.export.classifier import Stock, convert
from de3.export.exporter import CalibrationSamples, ExportSettings, certified
from de3.export.publish import as_stored, write_exits
from de3.export.seen import SEEN, hashes_of
from de3.export.training_set import Target, TrainingSet
from de3.model_store.architecture import Precision
from de3.model_store.model import Model
from de3.model_store.store import Artifact, Draft, Store
from de3.progress import console
from de3.runtime.flags import guard_of

MAX_HELD_BACK = 4000
# Groups of texts that certify and are used for nothing else; if these would be fewer, all texts fit and certify.
MIN_EXACT = 3000
SEED = 0  # seed of the split and of the fit of the exits
FEW_TEXTS = 500
MAX_FITTED = 20_000  # texts
MAX_TOKENS_FITTED = 40_000  # of a token classifier; with 100,000, exits were hardly faster
UNFINISHED = ".import"  # folder of intermediate results, which is removed at the end
BASE, STATES = f"{UNFINISHED}/base", f"{UNFINISHED}/states"


@dataclass(frozen=True)
class ImportSettings:
    """Options of an import.

    Attributes:
        threshold: probability above which a multi-label model assigns a label; None means 0.5.
        tolerance: required for a regression model: the largest difference between two values that count as equal.
        labelled: true if the texts have labels; otherwise the model's own answers are the labels.
        fragments: true if some texts are fragments of others.
    """

    threshold: float | None = None
    tolerance: float | None = None
    labelled: bool = False
    fragments: bool = False


@dataclass(frozen=True, slots=True)
class Fitted:
    """Exits fitted to a classifier, and what certifies them.

    Attributes:
        fields: of the manifest: how answers are read, and the input.
        texts: what they were fitted to.
    """

    exits: fit.Exits
    fields: Mapping[str, Any]
    held_out: CalibrationSamples
    texts: Sequence[TextOrPair]


def import_classifier(
    stock: Stock,
    rows: Sequence[tuple[TextOrPair, str]],
    groups: Sequence[str] | None,
    work: Path,
    settings: ImportSettings,
    store: Store,
    exporting: ExportSettings,
) -> Path:
    """Fit exits to a stock classifier on texts, and publish it as a model's next version; returns its folder.

    rows: texts and labels, "" if unlabelled. groups: group of each row; None if the rows are unrelated. work: folder
    for intermediate results, from which an interrupted import resumes; they are removed at the end.

    Raises ValueError for unusable texts and options, and ExportError as `exporter.certified` does.
    """
    _check(stock, settings)
    parts = _parts(rows, groups, stock, settings)
    held_out = [*parts.tune, *parts.certify]
    is_spans = stock.description.kind == "spans"
    # Exits are fitted to int8 states. Fragments of two texts would be fitted to where one of these certifies.
    may_cross = exporting.precision == "int8" and not is_spans and not settings.fragments
    is_crossed = may_cross and len(np.unique(groups_of(held_out))) < MIN_EXACT
    if is_crossed:
        what = f"{len(parts.train) + len(held_out)} texts to fit the exits and, cross-fitted, to certify"
    elif is_spans:
        what = f"{len(parts.train)} texts to fit the exits, {len(parts.tune)} to tune, {len(parts.certify)} to certify"
    else:
        what = f"{len(parts.train)} texts to fit the exits, {len(held_out)} to certify"
    console.print(
        f"{stock.architecture('fp32').encoder.type}, {stock.num_layers} layers; {what}", highlight=False
    )
    shutil.rmtree(work / BASE, ignore_errors=True)
    reference = base(stock, work / BASE, "fp32")  # checks all weights
    try:
        # certified() uses the flag, in minutes.
        guard_of(exporting.flag, reference.manifest.model_copy(update={"name": exporting.name}))
        _check_tolerance(stock, settings.tolerance, reference, held_out[:FEW_TEXTS])
    except ValueError:
        shutil.rmtree(work / BASE)
        raise
    quantized = base(stock, work / BASE, "int8")
    full, small = (Artifact(model.path, model.manifest) for model in (reference, quantized))
    if is_spans:
        return _published(_fit_spans(parts, quantized), full, small, work, store, exporting)
    # Even for an fp32 export, exits are fitted to int8 states, which take a fraction of the time to compute. Risk is
    # fitted to int8 answers, too, except of texts that also certify: a certificate is about the original's answers.
    fitting, certifying = (held_out + parts.train,) * 2 if is_crossed else (parts.train, held_out)
    computed = states.compute(quantized, [e.text for e in fitting], work / STATES, "fitting")
    certified_by = states.compute(reference, [e.text for e in certifying], work / STATES, "certifying", ())
    del reference, quantized  # frees their memory
    thresholds = _thresholds(stock, settings.threshold)
    kind = kind_of_text(thresholds, settings.tolerance)
    group = groups_of(fitting, settings.fragments)
    texts = TrainingSet(Target(computed.logits, kind), group, computed.states)
    as_served = partial(as_stored, precision=exporting.precision)
    exits, crossed = fit.fit(stock.num_layers, texts, SEED, as_served)
    answers = [label_of(row) for row in Target(certified_by.logits, kind).answers]
    certifying = answered(certifying, answers, settings.labelled)
    if is_crossed:
        labels = label_array([e.label for e in certifying], len(stock.description.labels))
        crossed = with_original(replace(crossed, labels=labels), certifying)
    tune = CalibrationPart(Samples(crossed, group), are_whole(fitting, settings.fragments))
    fields = {
        "thresholds": thresholds,
        "tolerance": settings.tolerance,
        "input": input_of(parts.train),
    }
    certify = certifying[: len(held_out)]
    samples = CalibrationSamples(tune, certify, is_crossed=is_crossed, self_labelled=not settings.labelled)
    return _published(
        Fitted(exits, fields, samples, [e.text for e in fitting]), full, small, work, store, exporting
    )


def _fit_spans(parts: Split, quantized: Model) -> Fitted:
    """Fit exits to a token classifier.

    Its own answers are the labels: those of full depth in the precision that is served, as int8 changes the spans of
    more texts than exits may.
    """
    tokens = [quantized.tokenize(*pair_of(e.text)) for e in parts.train]
    fitting = states.of_tokens(quantized, tokens, MAX_TOKENS_FITTED, SEED, "fitting")
    held_out = CalibrationSamples(parts.tune, parts.certify, self_labelled=True)
    return Fitted(fit.fit_tokens(fitting, SEED), {"input": "text"}, held_out, [e.text for e in parts.train])


def _published(
    fitted: Fitted, full: Artifact, small: Artifact, work: Path, store: Store, exporting: ExportSettings
) -> Path:
    """Publish a classifier with these exits, and remove intermediate results.

    full, small: the classifier in fp32 and int8.
    """

    def written(base: Artifact, draft: Draft) -> Model:
        # The source is set only for a classifier without exits.
        manifest = write_exits(base, fitted.exits, draft, name=exporting.name, source=None, **fitted.fields)
        # By the kernels, as it is served: on some processors, ONNX Runtime's int8 products saturate.
        return Model(Artifact(draft.path, manifest))

    with store.new_version(exporting.name) as draft, store.new_version(exporting.name) as other:
        is_int8 = exporting.precision == "int8"
        model = written(small if is_int8 else full, draft)
        plain = written(full, other) if is_int8 else model
        path = certified(draft, model, plain, fitted.held_out, exporting, {SEEN: hashes_of(fitted.texts)})
    shutil.rmtree(work / UNFINISHED, ignore_errors=True)
    with suppress(OSError):  # it is not empty
        work.rmdir()
    return path


def answers(
    stock: Stock, texts: Sequence[TextOrPair], thresholds: list[float] | None, tolerance: float | None
) -> list[Label]:
    """The classifier's full-depth answers to texts, in the order of the texts, computed in float32."""
    with TemporaryDirectory() as folder:
        model = base(stock, Path(folder), "fp32")
        logits = states.compute(model, texts, Path(folder), "original", ()).logits
    return [label_of(row) for row in kind_of_text(thresholds, tolerance).answers(logits)]


def base(stock: Stock, folder: Path, precision: Precision) -> Model:
    """Convert the classifier, without early exits, to an artifact in a new folder, and open it."""
    store = Store(folder / precision)
    convert(stock, store, "base", precision)
    return Model(store.open("base"), "auto" if precision == "int8" else "onnxruntime")


def _thresholds(stock: Stock, threshold: float | None) -> list[float] | None:
    """Probability thresholds of a multi-label model; None for other models."""
    if stock.description.kind != "labels":
        return None
    return [0.5 if threshold is None else threshold] * len(stock.description.labels)


def _check(stock: Stock, settings: ImportSettings) -> None:
    """Raise ValueError early for options that do not fit the classifier."""
    name, kind = stock.name, stock.description.kind
    if settings.tolerance is not None and kind != "value":
        raise ValueError(
            f"--tolerance: {name} has {len(stock.description.labels)} labels; it is for models that return a number"
        )
    if settings.labelled and kind == "spans":
        raise ValueError(
            f"--label-column: {name} is a token classifier; its exits are fitted to its own answers"
        )
    if settings.threshold is not None and kind != "labels":
        raise ValueError(
            f'--threshold: according to its config.json ("problem_type"), {name} is not a multi-label model; if '
            "it is one, add --multi-label"
        )


def _check_tolerance(stock: Stock, tolerance: float | None, model: Model, some: Sequence[Example]) -> None:
    """Raise ValueError for a regression model without a tolerance; the message describes the values of some texts."""
    if stock.description.kind != "value" or tolerance is not None:
        return
    logits = [model.full_depth(model.tokenize(*pair_of(e.text)))[-1].logits for e in some]
    values = np.array([float(one[0]) for one in logits if one is not None])
    low, high = np.quantile(values, (0.05, 0.95))
    spread = float(values.std())
    raise ValueError(
        "--tolerance: needed, because the answer is a number: the largest difference from full depth that counts as "
        f"equal, in the model's units. For 90% of {len(values)} of these texts, the answer is between {low:.3g} and "
        f"{high:.3g}; the standard deviation is {spread:.3g}: for example --tolerance "
        f"{max(MIN_TOLERANCE, spread / 4):.1g}"
    )


def _parts(
    rows: Sequence[tuple[TextOrPair, str]],
    groups: Sequence[str] | None,
    stock: Stock,
    settings: ImportSettings,
) -> Split:
    """Split the texts at random into parts to fit, tune and certify on; raises ValueError if there are too few.

    Only a token classifier's exits are tuned on texts of their own; otherwise the tuning texts certify, too.
    """
    labels = stock.description.labels
    if stock.description.kind == "spans":
        examples = [Example(text, 0) for text, _ in rows]
    elif stock.description.kind == "value":
        examples = to_examples(rows, labels, regression=True)
    else:
        is_multi = stock.description.kind == "labels"
        found = {name for _, label in rows for name in labels_in(label, is_multi)}
        examples = to_examples(rows, _names_in(found, labels), is_multi)
    if groups is not None:
        examples = [replace(e, group=group) for e, group in zip(examples, groups, strict=True)]
    if len(examples) < FEW_TEXTS:
        raise ValueError(
            f"{len(examples)} texts are too few to fit and certify exits: give {FEW_TEXTS} or more"
        )
    parts = split(examples, SEED, min(len(examples) // 5, MAX_HELD_BACK), settings.fragments)
    if len(parts.train) > MAX_FITTED:
        console.print(f"exits are fitted to {MAX_FITTED} of {len(parts.train)} texts, which is enough")
    return replace(parts, train=parts.train[:MAX_FITTED])


def _names_in(found: set[str], names: Sequence[str]) -> Sequence[str]:
    """The model's labels as they appear in the data: names, numbers, or "" if the data has none.

    Raises ValueError if the data has other labels. found: the labels in the data. names: the model's labels.
    """
    for known in ([""], names, [str(i) for i in range(len(names))]):
        if found <= set(known):
            if known is not names and known != [""]:
                pairs = ", ".join(f"{k} is {name}" for k, name in list(enumerate(names))[:5])
                console.print(
                    f"the data's labels are numbers, used as indices of the model's labels: {pairs}",
                    markup=False,
                )
            return known
    raise ValueError(
        f"the data has labels such as {sorted(found - set(names))[:5]}, but the model has {list(names)[:20]}: name the "
        "model's labels as the data does, with --label-names in the order of its logits"
    )
