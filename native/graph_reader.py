"""Reads an artifact's int8 ONNX graphs into a model of the kernels, if they compute what the kernels compute.

A graph is read node by node. Whatever export/graph.py would not have built (another operator, attribute,
type, shape or connection) has no kernels, and ONNX Runtime runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from native import NoKernelsError, kernels

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
NONE = np.zeros(0, np.float32)
ANY = -1  # a size that the weight itself decides


@dataclass(frozen=True)
class Weight:
    """A weight that a node takes: its element type and shape."""

    dtype: type
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shapes:
    """What every segment of a model must agree on.

    Attributes:
        hidden: the width of the hidden states.
        labels: how many.
        metric: dimensions of the metric space.
    """

    hidden: int
    labels: int
    metric: int


class _Reader:
    """Reads a graph's nodes in their order, and raises NoKernelsError at the first unexpected one."""

    def __init__(self, graph: Any, weights: dict[str, Any]) -> None:
        """weights: the graph's initializers, or those of the graph around a branch, by name."""
        self._nodes, self.weights = list(graph.node), weights
        self._at = 0
        self.attributes: dict[str, Any] = {}  # of the last node
        self.last = ""  # its first output

    def next_op(self) -> str:
        """The next node's operator; empty at the end."""
        return str(self._nodes[self._at].op_type) if self._at < len(self._nodes) else ""

    def node(
        self, op: str, *inputs: "str | Weight", domain: str = "", outputs: int = 1, **attributes: Any
    ) -> tuple[list[str], list[Array]]:
        """The names of the next node's outputs, and the weights that it takes.

        inputs: names of values, weights, or "" for one that is left out. attributes: those that it must have,
        and no others; None: any value.
        """
        if self._at >= len(self._nodes):
            raise NoKernelsError(f"it ends before {op}")
        node = self._nodes[self._at]
        self._at += 1
        if (node.domain, node.op_type) != (domain, op):
            raise NoKernelsError(f"operator {self._at} is {node.op_type}, not {op}")
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wrong = set(self.attributes) ^ set(attributes)
        wrong |= {n for n, v in attributes.items() if v is not None and self.attributes.get(n) != v}
        if wrong:
            raise NoKernelsError(f"{op} (operator {self._at}) has another {min(wrong)}")
        if len(node.input) != len(inputs) or len(node.output) != outputs:
            raise NoKernelsError(f"{op} (operator {self._at}) has other inputs or outputs")
        found = []
        for name, wanted in zip(node.input, inputs, strict=True):
            if isinstance(wanted, Weight):
                found.append(self._weight(op, name, wanted))
            elif name != wanted:
                raise NoKernelsError(f"{op} (operator {self._at}) takes another value")
        self.last = node.output[0]
        return list(node.output), found

    def _weight(self, op: str, name: str, wanted: Weight) -> Array:
        tensor = self.weights.get(name)
        if tensor is None:
            raise NoKernelsError(f"{op} (operator {self._at}) takes a value where a weight should be")
        array = numpy_helper.to_array(tensor)
        same = len(array.shape) == len(wanted.shape) and all(
            size in (other, ANY) for other, size in zip(array.shape, wanted.shape, strict=True)
        )
        if array.dtype != wanted.dtype or not same:
            raise NoKernelsError(f"{op} (operator {self._at}) has a weight of another type or shape")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise NoKernelsError(f"{op} (operator {self._at}) has a weight that is not finite")
        return np.ascontiguousarray(array) if array.ndim else array

    def linear(self, x: str, inputs: int, outputs: int) -> tuple[str, list[Array]]:
        """x·W + b in int8: the output's name; the weight (inputs, outputs), its scale and the bias."""
        floats = Weight(np.float32, (outputs,))  # with ANY, of the weight's own size
        (out,), (weight, scale, bias) = self.node(
            *("DynamicQuantizeMatMul", x, Weight(np.int8, (inputs, outputs)), floats, "", floats),
            domain=MICROSOFT,
        )
        if not len(scale) == len(bias) == weight.shape[1]:
            raise NoKernelsError(f"operator {self._at} has a weight of another shape")
        return out, [weight, scale, bias]

    def norm(self, x: str, hidden: int, name: str = "") -> "_Norm":
        """Layer norm; `name`: what its output must be called."""
        floats = Weight(np.float32, (hidden,))
        (out,), (scale, shift) = self.node("LayerNormalization", x, floats, floats, epsilon=None, axis=-1)
        if name and out != name:
            raise NoKernelsError(f"it gives out another value as {name}")
        return _Norm(scale, shift, float(self.attributes["epsilon"]))

    def end(self) -> None:
        """Nothing may follow."""
        if self._at != len(self._nodes):
            raise NoKernelsError("it goes on after its last operator")


@dataclass(frozen=True)
class _Norm:
    scale: Array
    shift: Array
    epsilon: float


@dataclass(frozen=True)
class _Layer:
    """An encoder layer's weights; linears: query, key and value; attention's output; up; down."""

    linears: list[list[Array]]  # weight, scale, bias of each
    norms: list[_Norm]
    heads: int
    inner: int
    gelu: bool


def load(graphs: Sequence[Any], mean: bool, exits: set[int], spaces: set[int], shapes: Shapes) -> Any:
    """Build the kernels' model of the segments in these GraphProtos, index = layer; raises NoKernelsError.

    mean: whether exits see the mean of the tokens, else the first one. exits: the layers that have one.
    spaces: those whose exit has a metric space.
    """
    if not kernels.supported():
        raise NoKernelsError(kernels.why_not())
    readers = [_Reader(graph, {w.name: w for w in graph.initializer}) for graph in graphs]
    heads: dict[int, list[Array]] = {}
    number = 0
    try:
        tables, norm = _read_embeddings(readers[0], shapes)
        layers = []
        for number, reader in enumerate(readers):
            if number:
                layers.append(_read_layer(reader, shapes))
                if (layers[-1].heads, layers[-1].inner, layers[-1].gelu) != (
                    *(layers[0].heads, layers[0].inner),
                    layers[0].gelu,
                ):
                    raise NoKernelsError("its sizes are not those of the layer before")
            if number in exits:
                heads[number] = _read_exit(
                    reader, "next_hidden" if number else "hidden", mean, number in spaces, shapes
                )
            reader.end()
    except NoKernelsError as error:
        raise NoKernelsError(f"layer {number}: {error}") from None
    except Exception as error:  # of protobuf or NumPy, over what is no graph of ours
        raise NoKernelsError(f"layer {number}: {type(error).__name__}: {error}") from None
    try:
        return _build(tables, norm, layers, heads, mean, shapes)
    except ValueError as error:  # sizes that have no kernels
        raise NoKernelsError(str(error)) from None


def _build(
    tables: list[Array],
    norm: _Norm,
    layers: list[_Layer],
    heads: dict[int, list[Array]],
    mean: bool,
    shapes: Shapes,
) -> Any:
    first = layers[0]
    model = kernels.new(shapes.hidden, first.heads, first.inner, len(layers), first.gelu, mean)
    kernels.set_embeddings(model, *tables)
    kernels.set_norm(model, 0, 0, norm.scale, norm.shift, norm.epsilon)
    for number, layer in enumerate(layers, 1):
        for which, (weight, scale, bias) in enumerate(layer.linears):
            kernels.set_linear(model, number, which, weight, scale, bias)
        for which, after in enumerate(layer.norms):
            kernels.set_norm(model, number, which, after.scale, after.shift, after.epsilon)
    for number, arrays in heads.items():
        kernels.set_exit(model, number, *arrays)
    return model


def _read_embeddings(r: _Reader, shapes: Shapes) -> tuple[list[Array], _Norm]:
    """Words (V, H) int8, their scales (V, 1), positions (P, H), types (T, H) or none; and the norm."""
    hidden, ids = shapes.hidden, "input_ids"
    (rows,), (words,) = r.node("Gather", Weight(np.int8, (ANY, hidden)), ids)
    (picked,), _ = r.node("Cast", rows, to=TensorProto.FLOAT)
    (scales,), (scale,) = r.node("Gather", Weight(np.float32, (ANY, 1)), ids)
    (x,), _ = r.node("Mul", picked, scales)
    (tokens,), _ = r.node("Shape", ids, start=1, end=2)
    zero = Weight(np.int64, (1,))
    (slice_,), (positions, *zeros) = r.node("Slice", Weight(np.float32, (ANY, hidden)), zero, tokens, zero)
    if any(z[0] != 0 for z in zeros) or len(scale) != len(words):
        raise NoKernelsError("its tables are read in another way")
    (x,), _ = r.node("Add", x, slice_)
    types = NONE
    if r.next_op() == "Gather":
        (kind,), (types,) = r.node("Gather", Weight(np.float32, (ANY, hidden)), "token_type_ids")
        (x,), _ = r.node("Add", x, kind)
    return [words, scale, positions, types], r.norm(x, hidden, "hidden")


def _read_layer(r: _Reader, shapes: Shapes) -> _Layer:
    hidden = shapes.hidden
    (x, x_scale, x_zero), _ = r.node("DynamicQuantizeLinear", "hidden", outputs=3)
    wide = Weight(np.float32, (3 * hidden,))
    (attended,), (weight, bias, scale) = r.node(
        *("QAttention", x, Weight(np.int8, (hidden, 3 * hidden)), wide, x_scale, wide, "", x_zero),
        domain=MICROSOFT,
        num_heads=None,
    )
    heads = int(r.attributes["num_heads"])
    out, attention_out = r.linear(attended, hidden, hidden)
    (x,), _ = r.node("Add", out, "hidden")
    after_attention = r.norm(x, hidden)
    middle = r.last
    up, ffn_in = r.linear(middle, hidden, ANY)
    inner = ffn_in[0].shape[1]
    gelu = r.next_op() == "Gelu"
    (x,), _ = r.node("Gelu", up, domain=MICROSOFT) if gelu else r.node("Relu", up)
    down, ffn_out = r.linear(x, inner, hidden)
    (x,), _ = r.node("Add", down, middle)
    after_ffn = r.norm(x, hidden, "next_hidden")
    linears = [[weight, scale, bias], attention_out, ffn_in, ffn_out]
    return _Layer(linears, [after_attention, after_ffn], heads, inner, gelu)


def _read_exit(r: _Reader, hidden: str, mean: bool, has_space: bool, shapes: Shapes) -> list[Array]:
    """Classifier (K, H) and bias; weight, scale and bias of the metric space, empty without one."""
    names = ["logits", "distances"][: 1 + has_space]
    outputs, _ = r.node("If", "with_exit", outputs=len(names), then_branch=None, else_branch=None)
    then, other = r.attributes["then_branch"], r.attributes["else_branch"]
    if outputs != names:
        raise NoKernelsError("its exit gives out other values")
    yes = _Reader(then, r.weights)
    if mean:
        (pooled,), _ = yes.node("ReduceMean", hidden, axes=[1], keepdims=0)
    else:
        (pooled,), (first,) = yes.node("Gather", hidden, Weight(np.int64, ()), axis=1)
        if first != 0:
            raise NoKernelsError("its exit sees another token than the first")
    matrix, labels = Weight(np.float32, (shapes.hidden, shapes.labels)), Weight(np.float32, (shapes.labels,))
    (logits,), (classifier, bias) = yes.node("Gemm", pooled, matrix, labels)
    given, space = [logits], [NONE, NONE, NONE]
    if has_space:
        x, space = yes.linear(pooled, shapes.hidden, shapes.metric)
        (unit,), _ = yes.node("LpNormalization", x, axis=1, p=2)
        (distances,), (one,) = yes.node(
            "Gemm", unit, "prototypes", Weight(np.float32, (1,)), alpha=-1.0, transB=1
        )
        if one[0] != 1:
            raise NoKernelsError("its distances are not 1 - cos")
        given.append(distances)
    yes.end()
    no = _Reader(other, r.weights)
    zeros = []
    for _ in names:
        (value,), _ = no.node("Constant", value=None)
        if numpy_helper.to_array(no.attributes["value"]).any():
            raise NoKernelsError("its exit gives out other values than zeros when it is not asked")
        zeros.append(value)
    no.end()
    if [o.name for o in then.output] != given or [o.name for o in other.output] != zeros:
        raise NoKernelsError("its exit gives out other values")
    return [np.ascontiguousarray(classifier.T), bias, *space]
