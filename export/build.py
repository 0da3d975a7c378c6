"""The ONNX segments of a model, one for the embeddings and one for each layer, and the manifest of its files."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors.numpy import save as save_tensors

from de3.export.weights import StateFile
from de3.model_store.architecture import Architecture
from de3.model_store.families.encoder import Config, Weights, named
from de3.model_store.graph import source_of
from de3.model_store.manifest import EXITS, SCHEMA_VERSION, Defaults, Manifest
from de3.model_store.segment_graph import build_exit, build_segment, exit_tensors, graph_name
from de3.model_store.store import Draft


def segments(
    architecture: Architecture, config: Config, state: StateFile, exits: Mapping[int, Weights]
) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the segments' files in execution order, one at a time, then of the exits' file.

    config: the encoder's configuration. exits: the weights of each exit, by layer; see segment_graph.build_exit.
    Raises KeyError for a missing weight, and ValueError for a weight of the wrong shape.
    """
    encoder = architecture.encoder
    for layer, file in enumerate(architecture.segment_files()):
        weights: Weights = (
            encoder.layer_weights(config, state, layer) if layer else encoder.embedding_weights(config, state)
        )
        built = build_segment(architecture, layer, source_of(weights))
        yield file, built.model(graph_name(layer)).SerializeToString()
    norm = final_norm(architecture, state)
    read = {
        layer: build_exit(architecture, layer, source_of({**weights, **norm})).weights
        for layer, weights in exits.items()
    }
    yield EXITS, save_tensors(exit_tensors(read))


def final_norm(architecture: Architecture, state: StateFile) -> Weights:
    """The weights of the norm between a layer's hidden states and its exit; empty if there is none."""
    encoder = architecture.encoder
    if not encoder.FINAL_NORM:
        return {}
    return named(state, "", {"final_norm": encoder.FINAL_NORM}, not encoder.HAS_BIASES)


def manifest_of(architecture: Architecture, draft: Draft, name: str, **fields: Any) -> Manifest:
    """The manifest of a draft's files, without a calibration: texts exit early only if their request gives a τ.

    name: name of the model. fields: other fields of the manifest; the version defaults to the next one in the store.
    """
    return Manifest.model_validate(
        {
            **dict(architecture),
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "version": draft.next_version(),
            "created": int(time.time()),
            "defaults": Defaults(tau=0, signal="entropy"),
            "calibration": None,
            "export": {},
            **fields,
            "files": draft.entries(),
        }
    )
