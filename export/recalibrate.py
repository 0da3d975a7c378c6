"""Recalibration of an artifact on other samples or records: a new signal, τ and guarantees for the same model."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example, check_disjoint, check_input, load_examples
from de3.data.split import groups_of, with_fragments
from de3.export import records
from de3.export.calibrate import Calibrated, CalibrationPart, calibrate
from de3.export.record import record
from de3.export.seen import warnings_of
from de3.model_store.fitted import FittedTexts
from de3.model_store.manifest import Manifest
from de3.model_store.model import Model, fitted_of
from de3.model_store.store import Artifact, Store
from de3.progress import console, warn
from de3.runtime.flags import guard_of

MIN_TEXTS = 500  # distinct texts or groups, as for de3 import: fewer would certify hardly any τ
SEED = 0


def recalibrate(
    artifact: Artifact,
    store: Store,
    tune_file: Path,
    certify_file: Path,
    max_loss: float,
    signal: str,
    flag: str | None = None,
) -> Path:
    """Publish an artifact's next version: the same files with a new calibration; returns its folder.

    max_loss, signal: `max_loss` and `wanted` of `calibrate`. flag: see ExportSettings. Raises ValueError for unusable
    samples, or a signal or flag that the model does not have, and StoreError for a damaged artifact.
    """
    _check_exits(artifact)
    manifest = artifact.manifest
    kind = {"multi_label": manifest.thresholds is not None, "regression": manifest.tolerance is not None}
    tune, certify = (load_examples(file, manifest.labels, **kind) for file in (tune_file, certify_file))
    for file, examples in ((tune_file, tune), (certify_file, certify)):
        check_input(examples, manifest.input, str(file))
        warn(warnings_of(manifest, [e.text for e in examples], file))
    check_disjoint(tune, certify, tune_file, certify_file)
    _report_related([*tune, *certify])
    model = Model(artifact)
    parts = [
        CalibrationPart.of(record(model, part, f"the {what} samples", for_fit=True), part)
        for part, what in ((tune, "tuning"), (certify, "certifying"))
    ]
    _warn_of_full_depth(artifact)
    guard = guard_of(flag, manifest)
    return _publish(
        artifact,
        store,
        calibrate(parts[0], parts[1], max_loss, signal, guard=guard, exit_cost=artifact.manifest.exit_cost),
    )


def recalibrate_on_records(
    artifact: Artifact,
    store: Store,
    files: Sequence[Path],
    max_loss: float,
    signal: str,
    flag: str | None = None,
) -> Path:
    """Like `recalibrate`, but on records of live traffic: the artifact's exits run on their states.

    The answers of full depth count as correct. Raises ValueError for unusable files and too few texts.
    """
    if artifact.manifest.upstream is not None:
        raise ValueError(f"{artifact.full_name} has an upstream: de3 serve --learn calibrates its exits")
    found = records.opened(files, artifact.manifest)
    rng = np.random.default_rng(SEED)
    found = found.part(records.thinned(found, np.arange(len(found)), rng))
    if (fitted := fitted_of(artifact)) is not None:
        found = found.part(~fitted.are_near(found.marks, found.client_hashes))
    whole = records.part_of(records.recorded(artifact, found), records.groups_of(found))
    # The later half certifies, without texts that are near to those of the earlier half and on which no exit fails.
    is_early = np.arange(len(found)) < len(found) // 2
    early = found.part(is_early)
    seen = FittedTexts(early.pieces, early.marks.means, early.client_hashes)
    counts = ~seen.are_near(found.marks, found.client_hashes)
    guard = guard_of(flag, artifact.manifest)
    for fails, rows in whole.samples.recorded.failures(None if guard is None else guard[1]):
        counts[rows] |= fails.any(1)
    is_late = ~is_early & counts
    return _on_own_answers(artifact, store, whole, is_early, is_late, max_loss, signal, flag)


def recalibrate_on_texts(
    artifact: Artifact,
    store: Store,
    examples: Sequence[Example],
    file: Path,
    max_loss: float,
    signal: str,
    fragments: bool = False,
    flag: str | None = None,
) -> Path:
    """Like `recalibrate`, but on unlabelled texts, read from a file: full depth's answers count as correct.

    examples: their labels are ignored. fragments: true if some texts are fragments of others.

    Raises ValueError for texts that the model does not take (single texts or pairs), and for too few texts.
    """
    _check_exits(artifact)
    check_input(examples, artifact.manifest.input, str(file))
    used = with_fragments(examples) if fragments else examples
    _check_count(_report_related(used, len(examples) - len(used)))
    warn(warnings_of(artifact.manifest, [e.text for e in examples], file))
    recorded = record(Model(artifact), used, "the texts", for_fit=True)
    recorded = replace(recorded, labels=recorded.answers[:, -1])
    whole = CalibrationPart.of(recorded, used)
    rng, groups = np.random.default_rng(SEED), whole.samples.groups
    count, is_tune = whole.samples.num_groups, np.zeros(whole.samples.num_groups, np.bool_)
    parts, share = [np.arange(count)], 2
    if (
        guard := guard_of(flag, artifact.manifest)
    ) is not None:  # flagged texts are few, and most of them certify
        flagged = np.unique(groups[recorded.flagged(guard[1])[:, -1]])
        parts, share = [flagged, np.setdiff1d(np.arange(count), flagged)], 4
    for part in parts:
        is_tune[part] = rng.permutation(len(part)) < len(part) // share
    in_tune = is_tune[groups]
    return _on_own_answers(artifact, store, whole, in_tune, ~in_tune, max_loss, signal, flag)


def _on_own_answers(
    artifact: Artifact,
    store: Store,
    whole: CalibrationPart,
    in_tune: NDArray[np.bool_],
    in_certify: NDArray[np.bool_],
    max_loss: float,
    signal: str,
    flag: str | None,
) -> Path:
    """Publish a version that is tuned on some of the texts and certified on others; both are masks, (n,)."""
    rows = in_tune | in_certify
    _check_count(len(np.unique(whole.samples.groups[rows])))
    tune, certify = (
        CalibrationPart(whole.samples.rows(rows), whole.is_whole[rows]) for rows in (in_tune, in_certify)
    )
    _warn_of_full_depth(artifact)
    guard = guard_of(flag, artifact.manifest)
    cost = artifact.manifest.exit_cost
    calibrated = calibrate(tune, certify, max_loss, signal, self_labelled=True, guard=guard, exit_cost=cost)
    return _publish(artifact, store, calibrated)


def _check_exits(artifact: Artifact) -> None:
    """Raise ValueError for a model without early exits."""
    if len(artifact.manifest.exit_layers) == 1:
        raise ValueError(f"{artifact.full_name} has no early exits to calibrate; de3 import adds them")


def _report_related(examples: Sequence[Example], left_out: int = 0) -> int:
    """Print how many examples are independent, fragments, or left out; returns the number of independent groups.

    left_out: number of fragments that are not among the examples.
    """
    groups, fragments = len(np.unique(groups_of(examples))), sum(e.is_fragment for e in examples)
    parts = [
        f"{len(examples)} texts, {groups} independent: identical texts, and those of one group, are related"
    ]
    if fragments:
        parts.append(f"fragments, which neither choose nor certify τ: {fragments}")
    if left_out:
        parts.append(f"left out, as fragments of several texts: {left_out}")
    console.print("; ".join(parts), soft_wrap=True, highlight=False)
    return groups


def _check_count(count: int) -> None:
    """Raise ValueError for too few distinct texts or groups."""
    if count < MIN_TEXTS:
        raise ValueError(
            f"{count} independent texts: too few to calibrate on; at least {MIN_TEXTS} are needed"
        )


def _publish(artifact: Artifact, store: Store, calibrated: Calibrated) -> Path:
    """Publish an artifact's next version with this calibration; returns its folder."""
    with store.new_version(artifact.manifest.name) as draft:
        draft.write({name: artifact.read(name) for name in artifact.manifest.files})
        earlier = artifact.manifest.missed
        if earlier is not None and earlier.flagged and calibrated.missed is None:
            warn(["without --flag, the new version has no certificate of missed texts"])
        fields: dict[str, Any] = {"version": draft.next_version(), "created": int(time.time())}
        fields |= {"missed": None if earlier is None else earlier.uncertified, **calibrated.fields()}
        return draft.publish(Manifest.model_validate({**artifact.manifest.model_dump(), **fields}))


def _warn_of_full_depth(artifact: Artifact) -> None:
    """Warn if the current calibration counts disagreement against the imported classifier."""
    calibration = artifact.manifest.calibration
    if calibration is not None and calibration.original_disagreement is not None:
        warn(
            [
                f"{artifact.full_name} was imported: its new calibration counts disagreement against full depth, "
                "which excludes the disagreement that int8 causes"
            ]
        )
