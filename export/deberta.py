"""Disentangled attention: the scores depend on the distance between two tokens and the content of each."""

import numpy as np

from de3.export.graph import Graph
from de3.training.encoders.weights import Array, Disentangled, Layer


def attention(g: Graph, hidden: str, layer: Layer, relative: Disentangled) -> str:
    """Attention of `hidden` (1, T, H), before its output projection, (1, T, H)."""
    qkv = g.linear(hidden, layer.qkv)
    parts = g.node("Split", qkv, axis=-1, outputs=3).removesuffix("_0")
    query, key, value = (f"{parts}_{i}" for i in range(3))
    added = _scores(g, hidden, query, key, layer.num_heads, relative)
    return g.ms(
        "MultiHeadAttention",
        *(query, key, value, "", "", added),
        num_heads=layer.num_heads,
        scale=relative.scale,
    )


def _scores(g: Graph, hidden: str, query: str, key: str, heads: int, relative: Disentangled) -> str:
    """The terms added to the attention scores, (1, heads, T, T).

    A short text needs only the middle rows of the tables; only these are multiplied.
    """
    zero, one = (g.constant(np.array(x, np.int64)) for x in (0, 1))
    axes = [g.constant(np.array([x], np.int64)) for x in (0, 1)]
    rows, middle = g.constant(relative.rows), g.constant(np.array([len(relative.rows) // 2], np.int64))
    tokens = g.node("Shape", hidden, start=1, end=2)
    numbers = g.node("Range", zero, g.node("Squeeze", tokens, axes[0]), one)
    offsets = g.node("Sub", g.node("Unsqueeze", numbers, axes[1]), g.node("Unsqueeze", numbers, axes[0]))
    needed = g.node("Gather", rows, g.node("Add", offsets, middle))  # (T, T)
    farthest = g.node("Sub", tokens, axes[1])
    first = g.node("Gather", rows, g.node("Sub", middle, farthest))
    last = g.node("Gather", rows, g.node("Add", middle, farthest))
    end = g.node("Add", last, g.constant(np.array([1], np.int32)))
    every_head = g.constant(np.array([1, heads, 1, 1], np.int64))
    index = g.node("Expand", g.node("Sub", needed, first), every_head)
    by_head = g.constant(np.array([0, 0, heads, -1], np.int64))
    added = []
    if relative.key_table is not None:
        queries = g.node("Transpose", g.node("Reshape", query, by_head), perm=[0, 2, 1, 3])
        table = _slice(g, _by_head(relative.key_table, heads, [1, 2, 0]), first, end, 2)
        added.append(g.node("GatherElements", g.node("MatMul", queries, table), index, axis=3))
    if relative.query_table is not None:
        keys = g.node("Transpose", g.node("Reshape", key, by_head), perm=[0, 2, 3, 1])
        table = _slice(g, _by_head(relative.query_table, heads, [1, 0, 2]), first, end, 1)
        added.append(g.node("GatherElements", g.node("MatMul", table, keys), index, axis=2))
    return added[0] if len(added) == 1 else g.node("Add", *added)


def _by_head(table: Array, heads: int, order: list[int]) -> Array:
    """A table (rows, hidden) as (rows, heads, head size), with the axes in this order."""
    return table.reshape(len(table), heads, -1).transpose(order)


def _slice(g: Graph, table: Array, first: str, end: str, axis: int) -> str:
    return g.node("Slice", g.constant(table), first, end, g.constant(np.array([axis], np.int32)))
