"""Record every exit of a model for the texts of a file."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exits.recorded import Recorded
from export.record import record
from loadtest.texts import read
from model_store.model import Model
from training.data import Example

NO_LABEL = -1


def recorded(model: Model, path: Path, columns: tuple[str, str], label_names: list[str]) -> Recorded:
    """Every exit of every text; the label is NO_LABEL if the file has none or the model does not know it.

    columns: those of the text and the label. label_names: names of numeric labels.
    """
    index = {name: i for i, name in enumerate(model.manifest.labels)}
    examples = [
        Example(sample.text, index.get(sample.label or "", NO_LABEL))
        for sample in read(path, *columns, label_names)
    ]
    return record(model, examples, path.name)


def nearest(texts: Recorded) -> NDArray[np.float64]:
    """Distance to the nearest prototype, (n, exits); NaN at exits without prototypes."""
    return np.asarray(texts.distances.min(-1), np.float64)


def joined(parts: list[Recorded]) -> Recorded:
    """The samples of several recordings of the same model."""
    return Recorded(
        parts[0].exit_layers,
        np.concatenate([p.logits for p in parts]),
        np.concatenate([p.distances for p in parts]),
        np.concatenate([p.labels for p in parts]),
    )
