"""Writes a model with other exits; its other weights do not change."""

from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from de3.export.build import manifest_of
from de3.export.fit import Exits
from de3.model_store.architecture import Architecture, Precision
from de3.model_store.graph import Array, quantize, source_of, stored
from de3.model_store.manifest import EXITS, PROTOTYPES, TOKENIZER, Manifest
from de3.model_store.model import exit_weights, read_segments
from de3.model_store.segment_graph import build_exit, exit_tensors
from de3.model_store.store import Artifact, Draft


def write_exits(base: Artifact, exits: Exits, draft: Draft, **fields: Any) -> Manifest:
    """Write a model into a draft, with these exits instead of its own; its other weights do not change.

    If the exits have a last one, it replaces the model's, too, and layers above it are left out. fields: fields of the
    manifest that differ from the base's. Returns the manifest, which has no calibration unless `fields` has one. Raises
    StoreError for a damaged base.
    """
    manifest, last = base.manifest, exits.num_layers
    layers = list(range(last))
    changed: dict[str, Any] = {
        "exit_layers": [*layers, last],
        "prototype_layers": list(range(len(exits.spaces))),
        "metric_dim": manifest.hidden_size,
        "pooling": exits.pooling,
    }
    if exits.has_last:
        changed |= {
            "encoder": manifest.encoder.up_to(last),
            "labels": fields.pop("labels", manifest.labels),
            "head": None,
        }
    architecture = Architecture.model_validate({**dict(manifest.architecture), **changed})
    for file, (graph, _) in zip(architecture.segment_files(), read_segments(base), strict=False):
        draft.write({file: graph})
    old = exit_weights(base)[manifest.num_layers]
    norm = {name: array for name, array in old.items() if name.startswith("final_norm.")}
    written = {}
    for layer in architecture.exit_layers:
        is_new = layer < len(exits.classifiers)
        source = source_of({**norm, **_weights(exits, layer)}) if is_new else stored(old)
        written[layer] = build_exit(architecture, layer, source).weights
    draft.write({EXITS: save_tensors(exit_tensors(written))})
    prototypes = {
        f"layer_{layer:02}": np.ascontiguousarray(rows, np.float32)
        for layer, rows in enumerate(exits.prototypes)
    }
    draft.write({PROTOTYPES: save_tensors(prototypes), TOKENIZER: base.read(TOKENIZER)})
    kept = {
        name: getattr(manifest, name)
        for name in ("source", "thresholds", "tolerance", "input", "upstream", "aggregation")
    }
    if manifest.missed is not None and not exits.has_last:  # another classifier is no such guard
        kept["missed"] = manifest.missed.uncertified
    return manifest_of(architecture, draft, **{"name": manifest.name, **kept, **fields})


def as_stored(exits: Exits, precision: Precision) -> Exits:
    """The exits as an artifact stores them: in int8, the weights of their prototypical networks are rounded."""
    if precision == "fp32":
        return exits
    spaces = []
    for weight, bias in exits.spaces:
        whole, scale = quantize(np.ascontiguousarray(weight.T))
        spaces.append((np.ascontiguousarray((whole * scale).T, np.float32), bias))
    return replace(exits, spaces=spaces)


def _weights(exits: Exits, layer: int) -> dict[str, Array]:
    """The weights of an exit, under the names that `build_exit` uses."""
    weight, bias = exits.classifiers[layer]
    weights = {"classifier.weight": np.ascontiguousarray(weight.T), "classifier.bias": bias}
    if layer < len(exits.spaces):
        weight, bias = exits.spaces[layer]
        weights |= {"space.weight": np.ascontiguousarray(weight.T), "space.bias": bias}
    return weights
