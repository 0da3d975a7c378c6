"""Recalibrate an artifact on other samples: new signal, τ and guarantees for the same model."""

import time
from pathlib import Path

from export.calibrate import Part, calibrate
from export.record import record
from model_store.manifest import SCHEMA_VERSION, Manifest
from model_store.model import Model
from model_store.store import Artifact, Store
from training.data import check_apart, check_input, load_examples


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
    tune, certify = (load_examples(file, names) for file in (tune_file, certify_file))
    for file, examples in ((tune_file, tune), (certify_file, certify)):
        check_input(examples, artifact.manifest.input, str(file))
    check_apart(tune, certify, tune_file, certify_file)
    model = Model(artifact, "onnxruntime")
    tuned = Part.of(record(model, tune, "the tuning samples"), tune)
    certified = Part.of(record(model, certify, "the certifying samples"), certify)
    calibrated = calibrate(tuned, certified, max_loss, signal)
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
