"""Reader of disentangled attention in the form that export/deberta.py builds; any other is refused."""

import numpy as np

from de3.model_store.graph_check import MICROSOFT, GraphError
from de3.model_store.manifest import Manifest
from de3.model_store.node_reader import ANY, Array, Reader, Weight, floats
from de3.native.network import Disentangled, Linear

ENCODER = "deberta-v2"
_SCALAR, _ONE, _ROW = Weight(np.int64, ()), Weight(np.int64, (1,)), Weight(np.int32, (1,))


def attention(r: Reader, manifest: Manifest) -> tuple[str, Linear, Disentangled]:
    """Attention of `hidden`: its output's name, the weights of its projection and the tables."""
    size = manifest.hidden_size
    x, qkv = r.linear("hidden", size, 3 * size)
    (query, key, value), _ = r.node("Split", x, outputs=3, axis=-1)
    index, first, end, rows, heads = _index(r, manifest)
    key_table = query_table = None
    added: list[str] = []
    if (r.next_op(), r.next_input()) == ("Reshape", query):
        by_head, table, key_table = _term(r, query, first, end, heads, [0, 2, 1, 3], 2)
        (scores,), _ = r.node("MatMul", by_head, table)
        added += r.node("GatherElements", scores, index, axis=3)[0]
    if (r.next_op(), r.next_input()) == ("Reshape", key):
        by_head, table, query_table = _term(r, key, first, end, heads, [0, 2, 3, 1], 1)
        (scores,), _ = r.node("MatMul", table, by_head)
        added += r.node("GatherElements", scores, index, axis=2)[0]
    shapes = [] if key_table is None else [(key_table.shape[2], key_table.shape[1])]
    shapes += [] if query_table is None else [query_table.shape[1:]]
    if not shapes or set(shapes) != {(shapes[0][0], size // heads)}:
        raise GraphError("its attention has no table for distances, or one of unexpected shape")
    _check_rows(rows, shapes[0][0])
    if len(added) == 2:
        added, _ = r.node("Add", *added)
    scale = float(np.float32((size // heads * (1 + len(shapes))) ** -0.5))
    (attended,), _ = r.node(
        *("MultiHeadAttention", query, key, value, "", "", *added),
        domain=MICROSOFT,
        num_heads=heads,
        scale=scale,
    )
    return attended, qkv, Disentangled(rows, key_table, query_table)


def _term(
    r: Reader, x: str, first: str, end: str, heads: int, perm: list[int], axis: int
) -> tuple[str, str, Array]:
    """One term of the scores: the names of the queries or keys by head and of the slice of the table that they are
    multiplied by, and the table, whose rows are on `axis`.
    """
    (parts,), (shape,) = r.node("Reshape", x, Weight(np.int64, (4,)))
    if shape.tolist() != [0, 0, heads, -1]:
        raise GraphError("its attention does not give each head a part of each token")
    (by_head,), _ = r.node("Transpose", parts, perm=perm)
    (rows,), (table, sliced) = r.node("Slice", floats(heads, ANY, ANY), first, end, _ROW)
    if sliced != axis:
        raise GraphError("its attention slices a table along an axis other than its rows")
    return by_head, rows, table


def _index(r: Reader, manifest: Manifest) -> tuple[str, str, str, Array, int]:
    """Indices of the tables' rows: the names of the index of two tokens, of the first row and of the end of the slice;
    the row for each distance; and the number of heads.
    """
    (tokens,), _ = r.node("Shape", "hidden", start=1, end=2)
    (count,), squeezed = r.node("Squeeze", tokens, _ONE)
    (numbers,), (zero, one) = r.node("Range", _SCALAR, count, _SCALAR)
    (queries,), a = r.node("Unsqueeze", numbers, _ONE)
    (keys,), b = r.node("Unsqueeze", numbers, _ONE)
    (offsets,), _ = r.node("Sub", queries, keys)
    (shifted,), (middle,) = r.node("Add", offsets, _ONE)
    (needed,), (rows,) = r.node("Gather", Weight(np.int32, (ANY,)), shifted)
    table = r.inputs[0]
    (farthest,), c = r.node("Sub", tokens, _ONE)
    (at,), d = r.node("Sub", _ONE, farthest)
    (first,), _ = r.node("Gather", table, at)
    (at,), e = r.node("Add", _ONE, farthest)
    (last,), _ = r.node("Gather", table, at)
    (end,), f = r.node("Add", last, _ROW)
    (index,), _ = r.node("Sub", needed, first)
    (index,), (shape,) = r.node("Expand", index, Weight(np.int64, (4,)))
    constants = [int(x.item()) for x in (*squeezed, zero, one, *a, *b, *c, *d, *e, *f)]
    longest = int(middle.item())  # distance
    if (
        constants != [0, 0, 1, 1, 0, 1, longest, longest, 1]
        or len(rows) != 2 * longest + 1
        or longest + 1 < manifest.max_tokens
    ):
        raise GraphError("its attention does not have a row for each distance between two tokens")
    heads = int(shape[1])
    if (
        shape.tolist() != [1, heads, 1, 1]
        or not 1 <= heads <= manifest.hidden_size
        or manifest.hidden_size % heads
    ):
        raise GraphError("its attention has an unexpected number of heads")
    return index, first, end, rows, heads


def _check_rows(rows: Array, count: int) -> None:
    """Raise GraphError unless rows number the buckets of distances: symmetric around the middle, one row for each small
    distance, and ascending with the distance.

    count: the number of rows of the tables.
    """
    longest, half = len(rows) // 2, count // 2
    low, high = rows[:longest][::-1].astype(np.int64), rows[longest + 1 :].astype(np.int64)
    near = min(half // 2, longest)
    sound = (
        count == 2 * half
        and rows.min() >= 0
        and rows[longest] == half
        and (high == np.minimum(2 * half - low, 2 * half - 1)).all()
        and (high[:near] == half + 1 + np.arange(near)).all()
        and (np.diff(high) >= 0).all()
    )
    if not sound:
        raise GraphError("its attention does not number distances by buckets")
