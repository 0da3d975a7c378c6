"""The parts of a segment: embeddings, a post-norm transformer block, an exit.

A segment runs one unpadded sample:

    embeddings.onnx   input_ids (1, T) int64, token_type_ids (1, T) int64 if the encoder has token types
                      → hidden (1, T, H)
    layer_NN.onnx     hidden (1, T, H) → next_hidden (1, T, H)

If its layer has an exit, it also takes with_exit, a boolean, and returns logits (1, K). If the exit has prototypes, it
takes them, (K, D) with unit rows, and returns distances (1, K). The exit is a branch, so a sample that cannot exit at a
layer does not pay for it; without with_exit, logits and distances are zeros.
"""

import numpy as np
from onnx import TensorProto, numpy_helper

from de3.export import deberta
from de3.export.graph import Graph, quantize
from de3.model_store.graph_reader import HEAD_ACTIVATIONS
from de3.training.encoders.weights import Array, Disentangled, Embeddings, Head, Layer, Linear, Norm


def embed(g: Graph, tables: Embeddings, ids: str, types: str | None) -> str:
    """Hidden states (1, T, H) of the embedding output."""
    if g.int8:
        # One scale per row. The cast follows the Gather: ONNX Runtime would fold a DequantizeLinear of the table into a
        # float32 table when it loads the model.
        rows, scale = quantize(np.ascontiguousarray(tables.word.T))
        picked = g.node("Cast", g.node("Gather", g.constant(rows.T), ids), to=TensorProto.FLOAT)
        x = g.node("Mul", picked, g.node("Gather", g.constant(scale[:, None]), ids))
    else:
        x = g.node("Gather", g.constant(tables.word), ids)
    if tables.position is not None:
        tokens = g.node("Shape", ids, start=1, end=2)
        zero = g.constant(np.array([0], np.int64))
        x = g.node("Add", x, g.node("Slice", g.constant(tables.position), zero, tokens, zero))
    if types is not None and tables.token_type is not None:
        x = g.node("Add", x, g.node("Gather", g.constant(tables.token_type), types))
    if tables.norm_last:
        return g.norm(x if tables.projection is None else g.linear(x, tables.projection), tables.norm)
    x = g.norm(x, tables.norm)
    return g.linear(x, tables.projection) if tables.projection is not None else x


def block(g: Graph, hidden: str, layer: Layer) -> str:
    """Hidden states (1, T, H) after one transformer block."""
    if isinstance(layer.relative, Disentangled):
        attended = deberta.attention(g, hidden, layer, layer.relative)
    elif layer.relative is not None:
        attended = _attention_with_offsets(g, hidden, layer, layer.relative)
    elif g.int8:
        parts = g.node("Split", g.linear(hidden, layer.qkv), axis=-1, outputs=3).removesuffix("_0")
        attended = g.ms("MultiHeadAttention", *(f"{parts}_{i}" for i in range(3)), num_heads=layer.num_heads)
    else:
        weight, bias = g.constant(layer.qkv.weight), g.constant(layer.qkv.bias)
        attended = g.ms("Attention", hidden, weight, bias, num_heads=layer.num_heads)
    # Not SkipLayerNormalization: it measured 5 times slower than Add and LayerNormalization.
    hidden = g.norm(g.node("Add", g.linear(attended, layer.attention_out), hidden), layer.attention_norm)
    inner = g.linear(hidden, layer.ffn_in)
    inner = g.activation(inner, layer.activation)
    return g.norm(g.node("Add", g.linear(inner, layer.ffn_out), hidden), layer.ffn_norm)


def _attention_with_offsets(g: Graph, hidden: str, layer: Layer, relative: Array) -> str:
    """Attention whose scores are offset by head and distance: `relative` is (heads, 2P − 1)."""
    middle = g.constant(np.array(relative.shape[1] // 2, np.int64))
    zero, one = (g.constant(np.array(x, np.int64)) for x in (0, 1))
    axes = [g.constant(np.array([x], np.int64)) for x in (0, 1)]
    numbers = g.node("Range", zero, g.node("Squeeze", g.node("Shape", hidden, start=1, end=2), axes[0]), one)
    offsets = g.node("Sub", g.node("Unsqueeze", numbers, axes[0]), g.node("Unsqueeze", numbers, axes[1]))
    picked = g.node("Gather", g.constant(relative), g.node("Add", offsets, middle), axis=1)
    added = g.node("Unsqueeze", picked, axes[0])  # (1, heads, T, T)
    qkv = g.linear(hidden, layer.qkv)
    parts = g.node("Split", qkv, axis=-1, outputs=3).removesuffix("_0")
    query, key, value = (f"{parts}_{i}" for i in range(3))
    return g.ms("MultiHeadAttention", query, key, value, "", "", added, num_heads=layer.num_heads)


def exit_heads(
    g: Graph,
    hidden: str,
    pooling: str,
    classifier: Linear,
    prototypical: Linear | None,
    head: Head | None = None,
    final_norm: Norm | None = None,
) -> None:
    """Add an exit: the input with_exit, the outputs logits and, with a prototypical network, distances.

    Exits stay in float32, where they cost almost nothing; only the weights of the prototypical network are int8.

    head: the layers between pooling and classifier. final_norm: applied to the hidden states before pooling.
    """
    labels = classifier.bias.shape[0]
    flag = g.input("with_exit", [], TensorProto.BOOL)
    yes, no = Graph(g.int8, "yes"), Graph(g.int8, "no")
    if pooling == "mean":
        seen = hidden if final_norm is None else yes.norm(hidden, final_norm)
        pooled = yes.node("ReduceMean", seen, axes=[1], keepdims=0)
    else:  # normalizes one token only
        pooled = yes.node("Gather", hidden, yes.constant(np.array(0, np.int64)), axis=1)
        pooled = pooled if final_norm is None else yes.norm(pooled, final_norm)
    if head is not None:
        dense = yes.node("Gemm", pooled, yes.constant(head.dense.weight), yes.constant(head.dense.bias))
        op = HEAD_ACTIVATIONS[head.activation]
        pooled = yes.ms(op, dense) if op == "Gelu" else yes.node(op, dense)
        pooled = pooled if head.norm is None else yes.norm(pooled, head.norm)
    logits = yes.node("Gemm", pooled, yes.constant(classifier.weight), yes.constant(classifier.bias))
    yes.output(logits, "yes_logits", [1, labels])
    names = ["logits"]
    if prototypical is not None:
        prototypes = g.input("prototypes", [labels, prototypical.bias.shape[0]])
        # 1 − cos: the prototypes are unit vectors, so only h' is normalized.
        unit = yes.node("LpNormalization", yes.linear(pooled, prototypical), axis=1, p=2)
        one = yes.constant(np.ones(1, np.float32))
        distances = yes.node("Gemm", unit, prototypes, one, alpha=-1.0, transB=1)
        yes.output(distances, "yes_distances", [1, labels])
        names.append("distances")
    for name in names:
        zeros = numpy_helper.from_array(np.zeros((1, labels), np.float32))
        no.output(no.node("Constant", value=zeros), f"no_{name}", [1, labels])
    g.branch(flag, yes, no, names, [1, labels])
