"""Encoders of real sizes with random weights: for measurements that do not depend on what a model has learned."""

from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper

from de3.model_store.architecture import Architecture
from de3.model_store.families.deberta import _row_numbers
from de3.model_store.graph import Array, Source
from de3.model_store.segment_graph import build_segment, graph_name

LABELS = ["safe", "unsafe"]
BUCKETS = 256  # of DeBERTa-v3, in each direction
FAMILIES = ("bert", "modernbert", "deberta-v2")


def architecture_of(family: str, layers: int, hidden: int, max_tokens: int) -> Architecture:
    """An int8 classifier of a family with exits at all layers, of the proportions of its base model."""
    encoder: dict[str, Any] = {
        "type": family,
        "num_layers": layers,
        "hidden_size": hidden,
        "width": hidden,
        "vocabulary": 1000,
        "positions": max_tokens if family == "bert" else 0,
        "token_types": 0,
        "num_heads": hidden // 64,
        "inner": hidden * 3 // 2 if family == "modernbert" else 4 * hidden,
        "activation": "gelu",
        "epsilon": 1e-5,
    }
    if family == "modernbert":
        encoder |= {"window": 64, "local_layers": [m for m in range(1, layers + 1) if (m - 1) % 3]}
    if family == "deberta-v2":
        encoder |= {"terms": ["c2p", "p2c"], "rows": 2 * BUCKETS, "distances": max_tokens}
    return Architecture.model_validate(
        {
            "encoder": encoder,
            "labels": LABELS,
            "exit_layers": list(range(layers + 1)),
            "prototype_layers": [],
            "metric_dim": 1,
            "max_tokens": max_tokens,
            "pooling": "mean",
            "precision": "int8",
        }
    )


def segments_of(architecture: Architecture, seed: int = 0) -> list[tuple[bytes, dict[str, Array]]]:
    """The segments' files and their weights; index = layer."""
    source = _random_source(architecture, np.random.default_rng(seed))
    graphs = [build_segment(architecture, layer, source) for layer in range(architecture.num_layers + 1)]
    return [(g.model(graph_name(m)).SerializeToString(), g.weights) for m, g in enumerate(graphs)]


def _random_source(architecture: Architecture, rng: np.random.Generator) -> Source:
    encoder = architecture.encoder

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
        values: Array
        if name == "frequencies":
            values = 1e4 ** -(np.arange(shape[0]) / shape[0])
        elif name == "row_numbers":
            config = {"position_buckets": BUCKETS, "max_position_embeddings": 512}
            values = _row_numbers(config, encoder.longest)
        elif dtype is np.int8:
            values = np.clip(np.rint(rng.standard_normal(shape) * 30), -127, 127)
        elif name.endswith(".scale"):
            rows = 1.0 if name == "word.scale" else encoder.hidden_size**0.5
            values = np.full(shape, 1 / (30 * rows))
        elif "norm" in name:
            values = np.ones(shape) if name.endswith(".weight") else np.zeros(shape)
        else:
            values = rng.standard_normal(shape) * (0.05 if len(shape) > 1 else 0.01)
        array = np.ascontiguousarray(values.astype(dtype))
        return numpy_helper.from_array(array, tensor), array

    return take
