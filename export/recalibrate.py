"""Calibrate an artifact anew on other samples: the model stays, λ, τ and every promise become theirs."""

import time
from pathlib import Path

from export.exporter import calibrate
from export.record import record
from model_store.manifest import Defaults, Manifest
from model_store.model import Model
from model_store.store import Artifact, Store
from training import data as datas

MAX_SHARED = 0.05  # of the certifying texts: real traffic repeats some


def recalibrate(
    artifact: Artifact, store: Store, tune_file: Path, certify_file: Path, max_loss: float
) -> Path:
    """Write the next version of an artifact, the same files with a new calibration; returns its folder.

    Raises ValueError for samples that cannot be read, StoreError for an artifact that is not sound.
    """
    names = list(artifact.manifest.labels)
    tune, certify = (datas.load_examples(file, names) for file in (tune_file, certify_file))
    shared = len({e.text for e in tune} & {e.text for e in certify})
    if shared > MAX_SHARED * len(certify):
        raise ValueError(
            f"{certify_file}: {shared} of its texts are in {tune_file} too; promises need samples that "
            "nothing was chosen on"
        )
    model = Model(artifact, "onnxruntime")
    table = calibrate(
        record(model, tune, "the tuning samples"), record(model, certify, "the certifying samples"), max_loss
    )
    with store.new_version(artifact.manifest.name) as draft:
        draft.write({name: artifact.read(name) for name in artifact.manifest.files})
        manifest = artifact.manifest.model_copy(
            update={
                "version": draft.next_version(),
                "created": int(time.time()),
                "calibration": table,
                "defaults": Defaults(tau=table.default.tau, lam=table.default.lam),
            }
        )
        return draft.publish(Manifest.model_validate(manifest.model_dump()))
