"""Every exit of a model, recorded for the texts of files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.exits.calibration import Samples
from de3.exits.recorded import Recorded
from de3.export.record import record
from de3.loadtest.texts import read
from de3.model_store.model import Model

NO_LABEL = -1


def recorded(
    model: Model,
    paths: Sequence[Path],
    columns: tuple[str, str],
    label_names: str = "",
    group_column: str | None = None,
) -> Samples:
    """Record every exit for every text of some files; a label that is missing or unknown to the model becomes NO_LABEL.

    columns: of the text and of the label. label_names: comma-separated names of numeric labels. group_column: texts
    with the same value are related; without it, each text is its own group.
    """
    index = {name: i for i, name in enumerate(model.manifest.labels)}
    samples = [sample for path in paths for sample in read(path, *columns, label_names, group_column)]
    examples = [Example(sample.text, index.get(sample.label or "", NO_LABEL)) for sample in samples]
    names = [sample.group or f"\0{i}" for i, sample in enumerate(samples)]
    groups = np.unique(names, return_inverse=True)[1].astype(np.int64)
    return Samples(record(model, examples, ", ".join(path.name for path in paths)), groups)


def nearest(texts: Recorded) -> NDArray[np.float64]:
    """Distance to the nearest prototype, (n, exits); NaN at exits without prototypes."""
    return np.asarray(texts.distances.min(-1), np.float64)
