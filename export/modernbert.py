"""A block of ModernBERT as ONNX nodes: pre-norm, RoPE, global or local attention, a gated feed-forward network.

No weight depends on the maximum length: positions, angles and masks are computed for each text. In a long text,
local attention runs block by block, so that its time and memory are linear in the number of tokens.
"""

import numpy as np
from onnx import TensorProto

from de3.export.graph import Graph
from de3.model_store.modernbert_reader import DENSE, MASKED
from de3.training.encoders.weights import PreNormLayer


def block(g: Graph, hidden: str, layer: PreNormLayer) -> str:
    """Hidden states (1, T, H) after one transformer block."""
    normed = hidden if layer.attention_norm is None else g.norm(hidden, layer.attention_norm)
    attended = g.linear(_attention(g, normed, layer), layer.attention_out)
    hidden = g.node("Add", attended, hidden)
    both = g.linear(g.norm(hidden, layer.ffn_norm), layer.ffn_in)
    inner = g.node("Split", both, axis=-1, outputs=2).removesuffix("_0")
    gated = g.node("Mul", g.activation(f"{inner}_0", layer.activation), f"{inner}_1")
    return g.node("Add", g.linear(gated, layer.ffn_out), hidden)


def _attention(g: Graph, x: str, layer: PreNormLayer) -> str:
    """Attention of x (1, T, H), before its output projection, (1, T, H)."""
    parts = g.node("Split", g.linear(x, layer.qkv), axis=-1, outputs=3).removesuffix("_0")
    query, key, value = (f"{parts}_{i}" for i in range(3))
    zero, one = (g.constant(np.array(i, np.int64)) for i in (0, 1))
    axes = [g.constant(np.array([i], np.int64)) for i in (0, 1)]
    length = g.node("Shape", x, start=1, end=2)
    tokens = g.node("Squeeze", length, axes[0])
    numbers = g.node("Cast", g.node("Range", zero, tokens, one), to=TensorProto.FLOAT)
    angles = g.node("Mul", g.node("Unsqueeze", numbers, axes[1]), g.constant(layer.frequencies))
    cos, sin = g.node("Cos", angles), g.node("Sin", angles)  # (T, size of a head / 2)
    query, key = (g.ms("RotaryEmbedding", part, axes[0], cos, sin) for part in (query, key))
    if layer.window is None:
        return g.ms("MultiHeadAttention", query, key, value, num_heads=layer.num_heads)

    # A short text is one block; a long one is split into blocks of a window's size, each with a window on either side.
    window = g.constant(np.array(layer.window, np.int64))
    is_long = g.node("Greater", tokens, g.constant(np.array(DENSE * layer.window, np.int64)))
    size = g.node("Where", is_long, window, tokens)
    around = g.node("Where", is_long, window, zero)
    last = g.node("Sub", tokens, one)
    count = g.node("Add", g.node("Div", last, size), one)

    # Positions of queries (blocks, size) and keys (blocks, size + 2·around). Outside the text, its first or last token
    # stands in; such keys are masked, and the results of such queries are cut off.
    starts = g.node("Unsqueeze", g.node("Mul", g.node("Range", zero, count, one), size), axes[1])
    queries = g.node("Add", starts, g.node("Range", zero, size, one))
    before, after = g.node("Neg", around), g.node("Add", size, around)
    keys = g.node("Add", starts, g.node("Range", before, after, one))
    real_queries, real_keys = g.node("Min", queries, last), g.node("Clip", keys, zero, last)

    columns = g.node("Unsqueeze", queries, g.constant(np.array([2], np.int64)))
    rows = g.node("Unsqueeze", keys, axes[1])
    near = g.node("LessOrEqual", g.node("Abs", g.node("Sub", columns, rows)), window)
    real = g.node("Unsqueeze", g.node("Equal", keys, real_keys), axes[1])
    seen = g.node("Unsqueeze", g.node("And", near, real), axes[1])
    unmasked, masked = (g.constant(np.array(x, np.float32)) for x in (0, MASKED))
    added = g.node("Where", seen, unmasked, masked)  # (blocks, 1, queries, keys)

    query, key, value = (
        g.node("Squeeze", g.node("Gather", part, picked, axis=1), axes[0])
        for part, picked in ((query, real_queries), (key, real_keys), (value, real_keys))
    )
    attended = g.ms("MultiHeadAttention", query, key, value, "", "", added, num_heads=layer.num_heads)
    attended = g.node("Reshape", attended, g.constant(np.array([1, -1, 0], np.int64)))
    return g.node("Slice", attended, axes[0], length, axes[1])
