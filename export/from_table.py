"""A new classifier from a table of texts and labels: exits on the layers of a frozen encoder."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from de3.data.examples import Example, input_of, label_array, labels_of
from de3.data.split import groups_of, stratified
from de3.data.tables import TextOrPair, pair_of
from de3.exits import calibration, risk
from de3.exits.calibration import FINE_TAUS, Samples
from de3.exits.kinds import Labels, kind_of_text
from de3.export import label_report, states
from de3.export.calibrate import CalibrationPart, calibrate
from de3.export.exporter import ExportSettings
from de3.export.labels import FOLDS, Fitted, fit_labels
from de3.export.publish import as_stored, write_exits
from de3.export.record import record
from de3.export.seen import SEEN, hashes_of
from de3.export.training_set import Target, TrainingSet
from de3.model_store.manifest import Defaults, Manifest, RiskWeights
from de3.model_store.model import Model
from de3.model_store.printable import printable
from de3.model_store.store import Artifact, Draft, Store
from de3.progress import console, warn
from de3.training import checks

CERTIFYING, MIN_CERTIFYING, MAX_CERTIFYING = 0.2, 500, 4000  # share of the texts; limits on their number
MAX_FITTED = 50_000  # texts
RARE = 10  # texts; of labels with no more of them, all are used
MAX_OUTPUTS = 2 * 10**8  # texts × exits × labels; cross-fitting takes about 25 bytes for each
SEED = 0
SHOWN = 3  # number of examples in a warning


def fit_table(
    base: Artifact,
    poolings: Sequence[str],
    examples: Sequence[Example],
    names: Sequence[str],
    threshold: float | None,
    store: Store,
    settings: ExportSettings,
) -> Path:
    """Fit a classifier to labelled texts, and publish it as a model's next version; returns its folder.

    base: an artifact with the encoder. poolings: poolings to try. names: the labels. threshold: probability above which
    a multi-label model assigns a label; None if each text has one label.

    A fifth of the texts certifies the exits, and is used for nothing else. If that would be fewer than MIN_CERTIFYING
    independent texts, all texts are used for fitting, and there is no certificate: the default τ and the report come
    from cross-fitting. Raises ValueError for unusable texts, and StoreError for a damaged encoder.
    """
    model = Model(base, "auto")
    warn(checks.unknown_tokens(Tokenizer.from_buffer(base.read("tokenizer.json")), examples))
    examples = _with_same_tokens(model, examples)
    warn(_contradictions(examples, names))
    most = min(MAX_FITTED, MAX_OUTPUTS // ((base.manifest.num_layers + 1) * len(names)))
    fitting, fold, certifying = _parts(examples, most)
    console.print(
        f"{base.manifest.encoder.type}, {base.manifest.num_layers} layers; {len(fitting)} texts to fit, "
        + (f"{len(certifying)} to certify" if certifying else "too few to certify the exits as well"),
        highlight=False,
    )
    thresholds = None if threshold is None else [threshold] * len(names)
    groups = groups_of(fitting)
    with TemporaryDirectory(prefix="de3-") as folder:
        computed = states.compute(model, [e.text for e in fitting], Path(folder), "fitting", poolings)
        del model  # frees its memory
        target = Target(None, kind_of_text(thresholds, None), _label_rows(fitting, len(names)))
        texts = TrainingSet(target, groups, computed.states)
        as_served = partial(as_stored, precision=base.manifest.precision)
        fitted = fit_labels(base.manifest.num_layers, texts, fold, poolings, as_served)
        fields = {
            "name": settings.name,
            "labels": list(names),
            "thresholds": thresholds,
            "tolerance": None,
            "source": None,
            "input": input_of(examples),
            "export": {SEEN: hashes_of([e.text for e in fitting])},
        }
        with store.new_version(settings.name) as draft:
            manifest = write_exits(base, fitted.exits, draft, **fields)
            if certifying:
                certified = _certified(draft, manifest, fitted, groups, certifying, settings.max_loss)
                return draft.publish(certified)
            return draft.publish(_estimated(manifest, fitted, groups, fitting, settings.max_loss))


def _with_same_tokens(model: Model, examples: Sequence[Example]) -> list[Example]:
    """The examples, in which the first of several texts with the same tokens replaces the others."""
    first = dict[bytes, TextOrPair]()
    found = []
    for example in examples:
        tokens = model.tokenize(*pair_of(example.text))
        key = tokens.ids.tobytes() + b"\0" + tokens.type_ids.tobytes()
        found.append(replace(example, text=first.setdefault(key, example.text)))
    return found


def _contradictions(examples: Sequence[Example], names: Sequence[str]) -> list[str]:
    """A warning about equal texts with different labels."""
    labels: dict[TextOrPair, set[tuple[int, ...]]] = defaultdict(set)
    for example in examples:
        labels[example.text].add(labels_of(example))
    wrong = [(text, found) for text, found in labels.items() if len(found) > 1]
    shown = "; ".join(
        f"{text!r:.80}: {' or '.join(', '.join(printable(names[k]) for k in each) or 'none' for each in sorted(found))}"
        for text, found in wrong[:SHOWN]
    )
    return [f"{len(wrong)} texts occur with different labels: {shown}"] if wrong else []


def _parts(
    examples: Sequence[Example], most: int = MAX_FITTED
) -> tuple[list[Example], NDArray[np.int64], list[Example]]:
    """The examples for fitting, the part in which each is held out, from 0, and the certifying examples, if any.

    most: about the largest number of examples for fitting. Raises ValueError if there are too few independent texts for
    two parts.
    """
    order = stratified(examples, SEED)
    share = min(CERTIFYING, MAX_CERTIFYING / len(examples))
    is_certifying = order < share
    certifying = [e for e, chosen in zip(examples, is_certifying, strict=True) if chosen]
    if len(np.unique(groups_of(certifying))) < MIN_CERTIFYING:
        certifying, is_certifying, share = [], np.zeros(len(examples), np.bool_), 0.0
    limit = share + most / len(examples)
    counts = Counter(label for e in examples for label in labels_of(e))
    is_rare = [any(counts[label] <= RARE for label in labels_of(e)) for e in examples]
    chosen = ~is_certifying & ((order < limit) | is_rare)
    if not (chosen | is_certifying).all():
        console.print(f"{chosen.sum()} of {len(examples)} texts are used for fitting, as more take too long")
    fitting = [e for e, is_fitting in zip(examples, chosen, strict=True) if is_fitting]
    fold = np.unique(np.floor(stratified(fitting, SEED + 1) * FOLDS), return_inverse=True)[1]
    if not fold.any():
        raise ValueError(
            "too few independent texts: at least one label needs two. Texts with the same tokens, and texts of one "
            "--group-column, count as one"
        )
    return fitting, fold, certifying


def _label_rows(examples: Sequence[Example], count: int) -> NDArray[np.bool_]:
    """True for each label of each example, (n, count)."""
    return label_array([labels_of(e) for e in examples], count).astype(np.bool_)


def _certified(
    draft: Draft,
    manifest: Manifest,
    fitted: Fitted,
    groups: NDArray[np.int64],
    certifying: Sequence[Example],
    max_loss: float,
) -> Manifest:
    """The manifest with a calibration on the certifying texts; also prints the report."""
    recorded = record(
        Model(Artifact(draft.path, manifest), "auto"), certifying, "the certifying texts", for_fit=True
    )
    tune = CalibrationPart(Samples(fitted.crossed, groups), np.ones(len(groups), np.bool_))
    certify = CalibrationPart.of(recorded, certifying)
    calibrated = calibrate(tune, certify, max_loss, may_pool=False, exit_cost=manifest.exit_cost)
    final = Manifest.model_validate(
        {**dict(manifest), **calibrated.fields(), "label_risk": _label_risk(fitted)}
    )
    label_report.report(
        certify.samples,
        final.default_signal.scores(recorded),
        final.defaults.tau,
        manifest.labels,
        [e.text for e in certifying],
        "texts that were not used for fitting",
    )
    return final


def _label_risk(fitted: Fitted) -> list[RiskWeights] | None:
    """The risk that an exit's answer differs from the label; None for a multi-label model."""
    crossed = fitted.crossed
    if isinstance(crossed.kind, Labels):
        return None
    both = zip(crossed.exit_layers, risk.label_weights(crossed), strict=True)
    return [RiskWeights(layer=layer, weights=list(weights)) for layer, weights in both]


def _estimated(
    manifest: Manifest,
    fitted: Fitted,
    groups: NDArray[np.int64],
    examples: Sequence[Example],
    max_loss: float,
) -> Manifest:
    """The manifest without a calibration, and with a default τ from cross-fitting; also prints the report."""
    samples = Samples(fitted.crossed, groups)
    signal, scores = risk.fit(fitted.crossed, groups), risk.cross_fit(fitted.crossed, groups)
    default = calibration.within_loss(calibration.trade_off(samples, signal, FINE_TAUS, scores), max_loss)
    label_report.report(
        samples,
        scores,
        default.tau,
        manifest.labels,
        [e.text for e in examples],
        "texts, by cross-validation",
    )
    warn(
        [
            f"{samples.num_groups} independent texts are too few for a certificate, so "
            + ("the default τ is an estimate" if default.tau else "by default no text exits early")
            + ", and requests with max_disagreement are refused. To limit disagreement by audits of live traffic: de3 "
            "serve --guarantee 0.02"
        ]
    )
    weights = [RiskWeights(layer=m, weights=list(w)) for m, w in enumerate(signal.weights) if w is not None]
    defaults = Defaults(tau=default.tau, signal="risk" if default.tau else "entropy")
    fields = {"risk": weights, "defaults": defaults, "label_risk": _label_risk(fitted)}
    return Manifest.model_validate({**dict(manifest), **fields})
