"""Records of live traffic, as texts to which exits are fitted or on which they are tested."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import Samples
from de3.exits.kinds import Spans, kind_of_text
from de3.exits.recorded import Recorded
from de3.export.calibrate import CalibrationPart
from de3.export.classifier import message_of
from de3.export.fit import Exits
from de3.export.record import recorded_spans
from de3.export.training_set import Target, TrainingSet
from de3.model_store.manifest import Manifest, base_of
from de3.model_store.model import Model, exit_weights, unit_prototypes
from de3.model_store.records import MAX_FILE_BYTES, Records, joined, read, shape_of
from de3.model_store.store import Artifact, StoreError

SLACK = 1.25  # over-representation of a client up to this factor is not corrected: it may be chance
MIN_OF_CLIENT = 30  # records of a client that make its weight reliable


def texts_of(records: Records, manifest: Manifest) -> TrainingSet:
    """A model's records, as texts to fit exits to; identical texts form a group. The states are mean-pooled."""
    target = Target(records.logits, kind_of_text(manifest.thresholds, manifest.tolerance))
    return TrainingSet(target, groups_of(records), lambda _, layer: records.states[:, layer])


def groups_of(records: Records) -> NDArray[np.int64]:
    """The group of each record, (n,), from 0: identical texts form one."""
    return np.unique(records.keys, return_inverse=True)[1].astype(np.int64)


def opened_model(artifact: Artifact) -> Model:
    """A model, to run on the tokens in records: by the kernels, if they can run it, without another proof of them."""
    try:
        return Model(artifact, is_proved=True)
    except StoreError:
        return Model(artifact, "onnxruntime")


def opened(files: Sequence[Path], manifest: Manifest) -> Records:
    """The records of one or more servers of a model; raises ValueError for unusable files."""
    found = []
    for file in {file.resolve(): file for file in files}.values():  # a file given twice counts once
        try:
            found.append(read(file, MAX_FILE_BYTES))
            check(found[-1], manifest)
        except (ValueError, OSError) as error:
            raise ValueError(message_of(str(file), error)) from None
    return joined(found)


def check(records: Records, manifest: Manifest) -> None:
    """Raise ValueError if the records belong to another model."""
    records.check(base_of(manifest), *shape_of(manifest))


def thinned(records: Records, rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Thin out rows at random, so that each client's share of them is about its share of the traffic.

    Records over-represent clients whose texts were drawn more often, and those that the reservoir protects.
    """
    clients = records.clients[rows]
    counts = np.bincount(clients, minlength=len(records.names))
    weights = np.array(records.texts) / np.maximum(counts, 1)  # number of texts that a record stands for
    known = counts >= MIN_OF_CLIENT
    most = weights[known].max() if known.any() else np.inf
    return rows[rng.random(len(rows)) * most <= SLACK * weights[clients]] if np.isfinite(most) else rows


def part_of(recorded: Recorded, groups: NDArray[np.int64]) -> CalibrationPart:
    """The recorded outputs of records, all of them whole texts, with the number of each text's group."""
    return CalibrationPart(Samples(recorded, groups), np.ones(len(groups), np.bool_))


def recorded(model: Artifact, records: Records) -> Recorded:
    """The outputs of a model's exits for its records; raises as exits_of does."""
    if isinstance(model.manifest.kind, Spans):
        tokens = [records.tokens(i) for i in range(len(records))]
        return recorded_spans(opened_model(model), tokens, "recorded texts")
    return exits_of(model).recorded(texts_of(records, model.manifest))


def exits_of(model: Artifact) -> Exits:
    """The exits of a model, to run on records.

    Raises ValueError if it has no exits of the form that is fitted to records, and StoreError for a damaged model.
    """
    manifest = model.manifest
    layers = list(range(manifest.num_states))
    has_all = manifest.exit_layers == list(range(manifest.num_layers + 1))
    if manifest.pooling != "mean" or not has_all or manifest.prototype_layers not in ([], layers):
        raise ValueError(
            f"{model.full_name}: records hold the mean of a text's tokens after each layer, but its exits use other "
            f"states: pooling {manifest.pooling}, exits at {manifest.exit_layers}"
        )
    classifiers, spaces = [], []
    for weights in list(exit_weights(model).values())[: len(layers)]:
        classifiers.append((weights["classifier.weight"].T, weights["classifier.bias"]))
        if manifest.prototype_layers:
            # In an int8 artifact, only this network of an exit is int8.
            space = weights["space.weight"] * weights.get("space.scale", np.ones(1, np.float32))
            spaces.append((np.ascontiguousarray(space.T), weights["space.bias"]))
    return Exits(manifest.pooling, classifiers, spaces, list(unit_prototypes(model).values()))
