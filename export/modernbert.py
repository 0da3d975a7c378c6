"""A block of ModernBERT as ONNX nodes: pre-norm, RoPE, attention to all tokens or to the neighbours, a gated network.

Nothing in it has the size of the longest text: positions, angles and masks are computed for the text at hand. In a
long text, attention to neighbours runs block by block, so that its time and memory grow with the tokens, not with their
square.
"""

import numpy as np

from export.graph import Graph
from training.encoders.weights import PreNormLayer

DENSE = 4  # windows: texts that are not longer are one block
MASKED = np.finfo(np.float32).min  # added to the score of a token that is not seen


def block(g: Graph, hidden: str, layer: PreNormLayer) -> str:
    """Hidden states (1, T, H) after one transformer block."""
    seen = hidden if layer.attention_norm is None else g.norm(hidden, layer.attention_norm)
    attended = g.linear(_attention(g, seen, layer), layer.attention_out)
    hidden = g.node("Add", attended, hidden)
    both = g.linear(g.norm(hidden, layer.ffn_norm), layer.ffn_in)
    inner = g.node("Split", both, axis=-1, outputs=2).removesuffix("_0")
    gated = g.node("Mul", g.activation(f"{inner}_0", layer.activation), f"{inner}_1")
    return g.node("Add", g.linear(gated, layer.ffn_out), hidden)


def _attention(g: Graph, x: str, layer: PreNormLayer) -> str:
    """What attention gives of x (1, T, H), before its last linear layer, (1, T, H)."""
    parts = g.node("Split", g.linear(x, layer.qkv), axis=-1, outputs=3).removesuffix("_0")
    query, key, value = (f"{parts}_{i}" for i in range(3))
    zero, one = (g.constant(np.array(i, np.int64)) for i in (0, 1))
    first, second = (g.constant(np.array([i], np.int64)) for i in (0, 1))
    shape = g.node("Shape", x, start=1, end=2)
    tokens = g.node("Squeeze", shape, first)

    numbers = g.node("Cast", g.node("Range", zero, tokens, one), to=1)
    angles = g.node("Mul", g.node("Unsqueeze", numbers, second), g.constant(layer.frequencies))
    cos, sin = g.node("Cos", angles), g.node("Sin", angles)  # (T, size of a head / 2)
    query, key = (g.ms("RotaryEmbedding", part, first, cos, sin) for part in (query, key))
    if layer.window is None:
        return g.ms("MultiHeadAttention", query, key, value, num_heads=layer.num_heads)

    # One block, or blocks of a window's size which see the windows before and after: (n, B) queries, (n, S) keys.
    window = g.constant(np.array(layer.window, np.int64))
    long = g.node("Greater", tokens, g.constant(np.array(DENSE * layer.window, np.int64)))
    size = g.node("Where", long, window, tokens)
    around = g.node("Where", long, window, zero)
    last = g.node("Sub", tokens, one)
    count = g.node("Add", g.node("Div", last, size), one)
    starts = g.node("Unsqueeze", g.node("Mul", g.node("Range", zero, count, one), size), second)
    queries = g.node("Add", starts, g.node("Range", zero, size, one))
    keys = g.node("Range", g.node("Neg", around), g.node("Add", size, around), one)
    keys = g.node("Add", starts, keys)
    # Before the first and after the last token stand copies of these, which are not seen.
    real_queries, real_keys = g.node("Min", queries, last), g.node("Clip", keys, zero, last)
    offsets = g.node(
        "Sub",
        g.node("Unsqueeze", queries, g.constant(np.array([2], np.int64))),
        g.node("Unsqueeze", keys, second),
    )
    near = g.node("LessOrEqual", g.node("Abs", offsets), window)  # (n, B, S)
    real = g.node("Unsqueeze", g.node("Equal", keys, real_keys), second)
    seen = g.node("Unsqueeze", g.node("And", near, real), second)  # (n, 1, B, S)
    added = g.node("Where", seen, *(g.constant(np.array(v, np.float32)) for v in (0, MASKED)))
    query, key, value = (
        g.node("Squeeze", g.node("Gather", part, rows, axis=1), first)
        for part, rows in ((query, real_queries), (key, real_keys), (value, real_keys))
    )
    attended = g.ms("MultiHeadAttention", query, key, value, "", "", added, num_heads=layer.num_heads)
    attended = g.node("Reshape", attended, g.constant(np.array([1, -1, 0], np.int64)))
    return g.node("Slice", attended, first, shape, second)
