"""The model in models/ is valid, small enough for the repository, and accurate."""

from pathlib import Path

import numpy as np

import de3
from de3.model_store.store import Store

MODELS = Path(__file__).parent.parent / "models"
TEXTS = {
    "a warm , funny , engaging film": "positive",
    "one of the best films of the year , moving from start to finish": "positive",
    "it is a dull , lifeless mess": "negative",
    "i wanted my two hours back": "negative",
    "not exactly a masterpiece , but it has its moments": "positive",
    "the plot is nothing but holes and the jokes are stale": "negative",
}


def test_it_is_sound_and_small() -> None:
    artifact = Store(MODELS).open("sst2")
    artifact.verify()
    assert sum(f.stat().st_size for f in MODELS.rglob("*") if f.is_file()) < 30e6
    assert artifact.manifest.precision == "int8"
    assert (MODELS / "sst2" / "README.md").exists()


def test_it_tells_good_from_bad_and_exits_early() -> None:
    with de3.load("sst2", store=MODELS) as model:
        rows = model.classify(list(TEXTS))
    assert [row.label for row in rows] == list(TEXTS.values())
    assert np.mean([row.exit.layer for row in rows]) < 4
