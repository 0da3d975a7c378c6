"""Stock classifiers: fine-tuned once for all workers, and imported by the command a user types."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from de3.data.examples import Example
from de3.exits.calibration import FINE_TAUS
from de3.export.classifier import Stock, convert
from de3.export.fit import Exits
from de3.export.publish import write_exits
from de3.model_store.architecture import Architecture, Precision
from de3.model_store.manifest import Defaults
from de3.model_store.model import exit_graph, exit_weights
from de3.model_store.segments import session_options
from de3.model_store.store import Artifact, Store
from de3.training.settings import TrainSettings
from tests.commands import de3
from tests.fine_tune import fine_tune
from tests.fixtures import TAGS, made_once, make_rows, save_encoder


def fine_tuned(
    name: str,
    encoder: Path,
    names: list[str],
    examples: list[Example],
    epochs: int,
) -> Path:
    """The folder of a stock model without exits, fine-tuned once for all workers."""

    def make(folder: Path) -> None:
        settings = TrainSettings(batch_size=32, lr=2e-3, epochs=epochs, bf16=False)
        for part in fine_tune(str(encoder), names, examples, settings):
            part.save_pretrained(folder)

    return made_once(name, make)


@contextmanager
def coarse_calibration() -> Iterator[None]:
    """Like the fixture few_taus, for fixtures that outlive a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("de3.export.calibrate.FINE_TAUS", FINE_TAUS[::24])
        yield


def imported_as(name: str, stock: Path, options: str = "") -> Path:
    """A folder with the import of a stock model: the artifact store/NAME/1, and log.txt.

    The texts of the import are unlabelled, and the artifact is in int8 unless the options say otherwise.

    options: further options of `de3 import`.
    """

    def make(folder: Path) -> None:
        texts = folder / "texts.txt"
        texts.write_text("".join(f"{text}\n" for text, _ in make_rows(800, 12)))
        with coarse_calibration():
            output = de3(
                f"import {stock} --texts {texts} --name {name} --store {folder}/store --work {folder}/work "
                f"--max-loss 5 {options}"
            )
        (folder / "log.txt").write_text(output)

    return made_once(f"imported-{name}", make)


def transformers_model(folder: Path) -> tuple[Any, Any]:
    """The classifier, in float32, and its tokenizer, as transformers opens them."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def largest_difference(folder: Path, graph: onnx.ModelProto, lengths: Sequence[int]) -> float:
    """Largest absolute difference between the logits of transformers and of a graph; one text of each length."""
    model, _ = transformers_model(folder)
    session = InferenceSession(graph.SerializeToString(), session_options())
    names = [x.name for x in session.get_inputs()]
    rng = np.random.default_rng(1)
    differences = []
    for length in lengths:
        ids, types = rng.integers(0, 40, (1, length)), np.sort(rng.integers(0, 2, (1, length)))
        inputs = {"input_ids": ids, "token_type_ids": types}
        feed = {name: inputs[name] for name in names}
        theirs = model(**{name: torch.tensor(value) for name, value in feed.items()}).logits.numpy()
        differences.append(np.abs(session.run(None, feed)[0] - theirs).max())
    return float(max(differences))


def graphs_of(
    folder: Path, int8: bool, token_types: bool | None = None
) -> tuple[Architecture, list[onnx.ModelProto]]:
    """The architecture and the graphs of a stock classifier with random exits: its segments, then its last exit.

    token_types: True if the tokenizer returns token types; None: as its files say.
    """
    with TemporaryDirectory() as made:
        store = Store(Path(made))
        artifact = with_random_exits(folder, store, "m", "int8" if int8 else "fp32", token_types=token_types)
        architecture = artifact.manifest.architecture
        last = exit_graph(
            architecture, architecture.num_layers, exit_weights(artifact)[architecture.num_layers]
        )
        graphs = [*(artifact.read(name) for name in architecture.segment_files()), last]
        return architecture, [onnx.load_model_from_string(graph) for graph in graphs]


def with_random_exits(
    folder: Path,
    store: Store,
    name: str,
    precision: Precision,
    seed: int = 0,
    token_types: bool | None = None,
) -> Artifact:
    """Publish a stock classifier with an exit of random weights at every layer but the last. See graphs_of.

    A token classifier also has random weights of the signal risk.
    """
    stock, rng = Stock.open(str(folder), folder), np.random.default_rng(seed)
    stock = stock if token_types is None else replace(stock, token_types=token_types)
    width, labels = stock.architecture(precision).hidden_size, len(stock.description.labels)

    def random(*shape: int) -> NDArray[np.float32]:
        return rng.normal(0, 0.02 if len(shape) > 1 else 0, shape).astype(np.float32)

    layers, fields = range(stock.num_layers), dict[str, Any]()
    exits = Exits(
        "mean",
        [(random(labels, width), random(labels)) for _ in layers],
        [(random(width, width), random(width)) for _ in layers],
        [rng.normal(size=(labels, width)).astype(np.float32) for _ in layers],
    )
    if stock.description.kind == "spans":
        exits = replace(
            exits,
            pooling="none",
            classifiers=[(20 * weight, bias) for weight, bias in exits.classifiers],
            spaces=[],
            prototypes=[],
        )
        risk = [{"layer": m, "weights": [7.2 - 2 * m, 0.3, 3.0, -3.0, 0.2]} for m in layers]
        fields = {"risk": risk, "defaults": Defaults(tau=0, signal="risk")}
    with TemporaryDirectory() as made, store.new_version(name) as draft:
        base = Store(Path(made))
        convert(stock, base, "base", precision)
        made_exits = write_exits(
            *(base.open("base"), exits, draft), name=name, source=None, input="text", **fields
        )
        draft.publish(made_exits)
    return store.open(name)


def token_classifier(family: str, tags: Sequence[str] = TAGS) -> Path:
    """The folder of a small token classifier with random weights."""
    name = f"tags-{family}-{len(tags)}-{len(tags[1])}"
    return made_once(name, lambda folder: save_encoder(folder, family, tags=tags))
