"""Recalibrate an artifact on other samples: new signal, τ and guarantees for the same model."""

import time
from collections.abc import Sequence
from pathlib import Path

from exits.recorded import Recorded
from export.calibrate import Part, calibrate
from export.record import record
from model_store.manifest import SCHEMA_VERSION, Manifest
from model_store.model import Model
from model_store.store import Artifact, Store
from training.data import Example, check_apart, check_input, load_examples, with_original
from training.progress import warn


def recalibrate(
    artifact: Artifact,
    store: Store,
    tune_file: Path,
    certify_file: Path,
    max_loss: float,
    signal: str = "auto",
) -> Path:
    """Write an artifact's next version, the same files with a new calibration; returns its folder.

    Raises ValueError for samples that cannot be read or used, and StoreError for a damaged artifact.
    """
    names = list(artifact.manifest.labels)
    tune, certify = (
        load_examples(
            file,
            names,
            artifact.manifest.thresholds is not None,
            artifact.manifest.tolerance is not None,
        )
        for file in (tune_file, certify_file)
    )
    for file, examples in ((tune_file, tune), (certify_file, certify)):
        check_input(examples, artifact.manifest.input, str(file))
    check_apart(tune, certify, tune_file, certify_file)
    model = Model(artifact, "onnxruntime")
    parts = [
        Part.of(_with_original(record(model, part, f"the {what} samples"), part, artifact), part)
        for part, what in ((tune, "tuning"), (certify, "certifying"))
    ]
    own = all(e.original is not None and e.label == e.original for e in certify)
    calibrated = calibrate(parts[0], parts[1], max_loss, signal, own)
    with store.new_version(artifact.manifest.name) as draft:
        draft.write({name: artifact.read(name) for name in artifact.manifest.files})
        manifest = artifact.manifest.model_copy(
            update={
                "version": draft.next_version(),
                "created": int(time.time()),
                "schema_version": SCHEMA_VERSION,
                **calibrated.fields(),
            }
        )
        return draft.publish(Manifest.model_validate(manifest.model_dump()))


def _with_original(recorded: Recorded, examples: Sequence[Example], artifact: Artifact) -> Recorded:
    """With the answers of the classifier that was imported, where the samples say them and they are what counts."""
    calibration = artifact.manifest.calibration
    if calibration is None or calibration.original_disagreement is None:
        return recorded
    known = with_original(recorded, examples)
    if known.original is None:
        warn(
            [
                f"{artifact.full_name} was imported, and the samples do not say how the original answered them "
                '("original", as in the files of the import): disagreement is counted against full depth, without '
                "the share of int8"
            ]
        )
    return known
