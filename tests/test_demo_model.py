"""The model in models/ is valid, small enough for the repository, and accurate."""

from pathlib import Path

import numpy as np

from de3.exits.reading import read
from de3.exits.rule import ExitRule
from de3.model_store.model import Model
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
    model = Model(Store(MODELS).open("sst2"))
    defaults = model.manifest.defaults
    rule = ExitRule(defaults.tau, model.manifest.default_signal)
    layers = []
    for text, label in TEXTS.items():
        for layer, step in enumerate(model.full_depth(model.tokenize(text))):
            assert step.logits is not None
            distances = None if step.distances is None else step.distances.tolist()
            reading = read(layer, step.logits.tolist(), distances)
            if rule.exits(rule.signal.score([reading])) or layer == model.manifest.num_layers:
                layers.append(layer)
                break
        assert model.manifest.labels[reading.label] == label, text
    assert np.mean(layers) < 4
