"""Writes a model with other exits; its other weights do not change."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save as save_tensors

from de3.export.build import manifest_of
from de3.export.fit import Exits
from de3.model_store.architecture import Architecture, Precision
from de3.model_store.graph import Array, Source, quantize, source_of
from de3.model_store.manifest import Manifest
from de3.model_store.model import check_segment
from de3.model_store.segment_graph import build_segment, graph_name
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
        "prototype_layers": layers if exits.spaces else [],
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
    norm: Mapping[str, Array] = {}
    # From the last layer down, as its exit has the norm that all exits share.
    for layer in sorted({manifest.num_layers, last, *layers}, reverse=True):
        file = manifest.segment_files()[layer]
        old = check_segment(base, layer, base.read(file))
        norm = norm or {name: old[name] for name in old if name.startswith("final_norm.")}
        if layer > last:
            continue
        new = _weights(exits, layer) if layer < len(exits.classifiers) else {}
        built = build_segment(architecture, layer, _source(old, {**norm, **new}))
        draft.write({file: built.model(graph_name(layer)).SerializeToString()})
    prototypes = {
        f"layer_{layer:02}": np.ascontiguousarray(rows, np.float32)
        for layer, rows in enumerate(exits.prototypes)
    }
    draft.write({"prototypes.safetensors": save_tensors(prototypes)})
    draft.write({"tokenizer.json": base.read("tokenizer.json")})
    kept = {name: getattr(manifest, name) for name in ("source", "thresholds", "tolerance", "input")}
    return manifest_of(architecture, draft, **{"name": manifest.name, **kept, **fields})


def rounded(exits: Exits, precision: Precision) -> Exits:
    """The exits as an artifact stores them: in int8, the weights of their prototypical networks are rounded."""
    if precision == "fp32":
        return exits
    spaces = []
    for weight, bias in exits.spaces:
        whole, scale = quantize(np.ascontiguousarray(weight.T))
        spaces.append((np.ascontiguousarray((whole * scale).T, np.float32), bias))
    return replace(exits, spaces=spaces)


def _weights(exits: Exits, layer: int) -> dict[str, Array]:
    """The weights of an exit, under the names that `build_segment` uses."""
    weight, bias = exits.classifiers[layer]
    weights = {"classifier.weight": np.ascontiguousarray(weight.T), "classifier.bias": bias}
    if layer < len(exits.spaces):
        weight, bias = exits.spaces[layer]
        weights |= {"space.weight": np.ascontiguousarray(weight.T), "space.bias": bias}
    return weights


def _source(old: Mapping[str, Array], new: dict[str, Array]) -> Source:
    """A source of weights: `new` has those of new exits; all others come unchanged from `old`, of the artifact."""
    added = source_of(new)
    modules = {name.partition(".")[0] for name in new if not name.startswith("final_norm.")}

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[onnx.TensorProto, Array]:
        if name.partition(".")[0] in modules or name not in old:
            return added(tensor, name, dtype, shape)
        return numpy_helper.from_array(old[name], tensor), old[name]

    return take
