"""Reader of ModernBERT's layers in the form that export/modernbert.py builds; any other is refused."""

from typing import Any

import numpy as np
from onnx import TensorProto

from de3.model_store.graph_check import MICROSOFT, GraphError
from de3.model_store.manifest import Manifest
from de3.model_store.node_reader import ANY, Array, Reader, Weight, floats
from de3.native.network import PreNormLayer

DENSE = 4  # windows: texts up to this length are one block
MASKED = float(np.finfo(np.float32).min)  # added to the score of a masked token
SCALAR, AXIS = Weight(np.int64, ()), Weight(np.int64, (1,))


def layer(r: Reader, number: int, manifest: Manifest) -> PreNormLayer:
    """A transformer block from hidden to next_hidden; the first is number 1."""
    size = manifest.hidden_size
    normed, attention_norm = "hidden", None
    if number > 1:  # the embeddings end with a norm
        normed, attention_norm = r.norm(normed, size)
    x, qkv = r.linear(normed, size, 3 * size)
    attended, frequencies, heads, window = _attention(r, x, normed)
    if not isinstance(heads, int) or heads * len(frequencies) * 2 != size:
        raise GraphError("its attention has an unexpected 'num_heads'")
    if frequencies[0] != 1 or frequencies[-1] < 0 or (np.diff(frequencies) > 0).any():
        raise GraphError("its positions have frequencies that do not descend from 1 to 0")
    x, attention_out = r.linear(attended, size, size)
    (middle,), _ = r.node("Add", x, "hidden")
    x, ffn_norm = r.norm(middle, size)
    both, ffn_in = r.linear(x, size, ANY)
    inner, odd = divmod(len(ffn_in.bias), 2)
    if odd:
        raise GraphError("its gated network has an odd size")
    (x, gate), _ = r.node("Split", both, outputs=2, axis=-1)
    x, activation = r.activation(x)
    (x,), _ = r.node("Mul", x, gate)
    x, ffn_out = r.linear(x, inner, size)
    (x,), _ = r.node("Add", x, middle)
    r.is_called(x, "next_hidden")
    return PreNormLayer(
        *(attention_norm, qkv, attention_out, ffn_norm, ffn_in, ffn_out),
        *(heads, activation, frequencies, window),
    )


def _attention(r: Reader, qkv: str, source: str) -> tuple[str, Array, int, int | None]:
    """Attention on qkv: its output's name, the frequencies of its positions, its heads and its window.

    source: the value whose shape gives the text's length.
    """
    (query, key, value), _ = r.node("Split", qkv, outputs=3, axis=-1)
    (shape,), _ = r.node("Shape", source, start=1, end=2)
    c = _Constants(r)
    tokens = c.node("Squeeze", shape, AXIS)
    numbers = c.node("Cast", c.node("Range", SCALAR, tokens, SCALAR), to=TensorProto.FLOAT)
    numbers = c.node("Unsqueeze", numbers, AXIS)
    (angles,), (frequencies,) = r.node("Mul", numbers, floats(ANY))
    cos = c.node("Cos", angles)
    sin = c.node("Sin", angles)
    query, key = (c.node("RotaryEmbedding", part, AXIS, cos, sin, domain=MICROSOFT) for part in (query, key))
    c.expect(0, 0, 1, 1, 0, 0)
    if r.next_op() == "MultiHeadAttention":
        (x,), _ = r.node("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=None)
        return x, frequencies, r.attributes["num_heads"], None
    return _local_attention(r, query, key, value, shape, tokens, frequencies)


def _local_attention(
    r: Reader, query: str, key: str, value: str, shape: str, tokens: str, frequencies: Array
) -> tuple[str, Array, int, int]:
    """Attention within a window, see _attention. shape, tokens: the text's length, (1,) and ()."""
    c = _Constants(r)
    is_long = c.node("Greater", tokens, SCALAR)
    size = c.node("Where", is_long, SCALAR, tokens)
    around = c.node("Where", is_long, SCALAR, SCALAR)
    last = c.node("Sub", tokens, SCALAR)
    count = c.node("Add", c.node("Div", last, size), SCALAR)
    window = int(c.values[1])
    c.expect(DENSE * window, window, window, 0, 1, 1)
    if window < 1:
        raise GraphError("its attention has a window below 1")

    starts = c.node("Mul", c.node("Range", SCALAR, count, SCALAR), size)
    starts = c.node("Unsqueeze", starts, AXIS)
    queries = c.node("Add", starts, c.node("Range", SCALAR, size, SCALAR))
    before, after = c.node("Neg", around), c.node("Add", size, around)
    keys = c.node("Add", starts, c.node("Range", before, after, SCALAR))
    real_queries, real_keys = c.node("Min", queries, last), c.node("Clip", keys, SCALAR, last)
    c.expect(0, 1, 1, 0, 1, 1, 0)

    columns, rows = c.node("Unsqueeze", queries, AXIS), c.node("Unsqueeze", keys, AXIS)
    near = c.node("LessOrEqual", c.node("Abs", c.node("Sub", columns, rows)), SCALAR)
    real = c.node("Unsqueeze", c.node("Equal", keys, real_keys), AXIS)
    seen = c.node("Unsqueeze", c.node("And", near, real), AXIS)
    added = c.node("Where", seen, floats(), floats())
    c.expect(2, 1, window, 1, 1, 0, MASKED)

    query, key, value = (
        c.node("Squeeze", c.node("Gather", part, picked, axis=1), AXIS)
        for part, picked in ((query, real_queries), (key, real_keys), (value, real_keys))
    )
    (x,), _ = r.node("MultiHeadAttention", query, key, value, "", "", added, domain=MICROSOFT, num_heads=None)
    heads = r.attributes["num_heads"]
    (x,), (whole,) = r.node("Reshape", x, Weight(np.int64, (3,)))
    x = c.node("Slice", x, AXIS, shape, AXIS)
    c.expect(0, 0, 0, 0, 1)
    if whole.tolist() != [1, -1, 0]:
        raise GraphError("its attention joins blocks in an unexpected way")
    return x, frequencies, heads, window


class _Constants:
    """Reader of nodes whose weights are single numbers."""

    def __init__(self, r: Reader) -> None:
        self._r = r
        self.values: list[Any] = []  # not yet compared

    def node(self, op: str, *inputs: str | Weight, domain: str = "", **attributes: int) -> str:
        """Read the next node, which has one output: its name."""
        (out,), constants = self._r.node(op, *inputs, domain=domain, **attributes)
        self.values += [array.item() for array in constants]
        return out

    def expect(self, *wanted: float) -> None:
        """Raise GraphError unless the constants read since the last call are these."""
        if self.values != list(wanted):
            raise GraphError("its attention has an unexpected constant")
        self.values = []
