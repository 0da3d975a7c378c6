"""The ONNX segments of a DE3-BERT: one for the embeddings and one per layer, each with its exit."""

import onnx
from onnx import TensorProto

from de3.export import modernbert
from de3.export.graph import Graph
from de3.export.segment import block, embed, exit_heads
from de3.training.encoders import family
from de3.training.encoders.weights import Head, Norm, PreNormLayer, linear, norm
from de3.training.model import De3Model


def file_name(layer: int) -> str:
    """File name of a layer's segment; layer 0 is the embedding output."""
    return "embeddings.onnx" if layer == 0 else f"layer_{layer:02}.onnx"


def build(model: De3Model, int8: bool, token_types: bool) -> dict[str, onnx.ModelProto]:
    """Build the segments of a model: by file name, in execution order.

    token_types: True if the model's tokenizer returns token types.
    """
    shape = [1, "tokens", model.config.hidden_size]
    known = family(model.encoder.config)
    tables = known.embeddings(model.encoder, token_types)
    final_norm = known.final_norm(model.encoder)
    segments: dict[str, onnx.ModelProto] = {}

    g = Graph(int8)
    ids = g.input("input_ids", [1, "tokens"], TensorProto.INT64)
    has_types = tables.token_type is not None
    types = g.input("token_type_ids", [1, "tokens"], TensorProto.INT64) if has_types else None
    g.output(embed(g, tables, ids, types), "hidden", shape)
    _add_exit(g, "hidden", 0, model, final_norm)
    segments[file_name(0)] = g.model("embeddings")

    for m, layer in enumerate(known.layers(model.encoder), 1):
        g = Graph(int8)
        hidden = g.input("hidden", shape)
        next_hidden = (
            modernbert.block(g, hidden, layer) if isinstance(layer, PreNormLayer) else block(g, hidden, layer)
        )
        g.output(next_hidden, "next_hidden", shape)
        _add_exit(g, "next_hidden", m, model, final_norm)
        segments[file_name(m)] = g.model(f"layer_{m}")
    return segments


def _add_exit(g: Graph, hidden: str, layer: int, model: De3Model, final_norm: Norm | None) -> None:
    """Add the exit of a layer, if it has one."""
    config = model.config
    if layer in config.exit_layers:
        classifier = linear(model.classifiers[config.exit_layers.index(layer)])
        space = (
            linear(model.prototypical[config.prototype_layers.index(layer)])
            if layer in config.prototype_layers
            else None
        )
        head, pooling = None, config.pooling
        if layer == config.num_layers and model.head is not None:
            after = norm(model.head_norm) if model.head_norm is not None else None
            head, pooling = Head(linear(model.head), config.head["activation"], after), config.head["pooling"]
        exit_heads(g, hidden, pooling, classifier, space, head, final_norm)
