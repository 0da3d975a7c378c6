"""Sequential reader of a graph's nodes, the base of graph_reader.py and of the families' readers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from de3.model_store.graph_check import MICROSOFT, GraphError
from de3.native.network import Linear, Norm

Array = NDArray[Any]
ANY = -1  # size taken from the weight
ACTIVATIONS = ("Gelu", "FastGelu", "Relu")

# A token's activations are shifted and scaled to −128 … 127: 1/255 of their range is a step, the center is 128 steps
# above the lowest, and a step has a minimum, as all activations may be equal.
TOKEN_QUANTIZATION = (float(np.float32(1 / 255)), 128.0, float(np.float32(1e-30)))


def center_sums(weight: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Outputs (outputs,) of int8 weights (inputs, outputs) for inputs that are all 1."""
    return np.asarray(scale * weight.sum(0, dtype=np.int32).astype(np.float32))


@dataclass(frozen=True)
class Weight:
    """Element type and shape of a weight that a node takes."""

    dtype: type
    shape: tuple[int, ...]


def floats(*shape: int) -> Weight:
    """A float32 weight."""
    return Weight(np.float32, shape)


class Reader:
    """Reader of a graph's nodes in their order; raises GraphError at the first unexpected one."""

    def __init__(self, graph: Any, weights: dict[str, Any], int8: bool) -> None:
        """weights: the graph's initializers, or those of the graph around a branch, by name."""
        self._nodes, self.weights, self.int8 = list(graph.node), weights, int8
        self._at = 0
        self.used: set[str] = set()  # weights
        self.attributes: dict[str, Any] = {}  # of the last node
        self.inputs: list[str] = []  # of the last node

    def next_op(self) -> str:
        """The next node's operator; empty at the end."""
        return str(self._nodes[self._at].op_type) if self._at < len(self._nodes) else ""

    def next_input(self) -> str:
        """The name of the next node's first input; empty if there is none."""
        return str(next(iter(self._nodes[self._at].input), "")) if self._at < len(self._nodes) else ""

    def node(
        self, op: str, *inputs: str | Weight, domain: str = "", outputs: int = 1, **attributes: Any
    ) -> tuple[list[str], list[Array]]:
        """Read the next node: the names of its outputs, and the weights that it takes.

        inputs: expected names of values, weights, or "" for an omitted one. attributes: exactly those expected; None:
        any value.
        """
        if self._at >= len(self._nodes):
            raise GraphError(f"it ends before {op}")
        node = self._nodes[self._at]
        self._at += 1
        if (node.domain, node.op_type) != (domain, op):
            operator = f"{node.domain}.{node.op_type}".lstrip(".")
            raise GraphError(f"operator {self._at} is {operator}, not {op}")
        names = [a.name for a in node.attribute]
        self.inputs = list(node.input)
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wrong = set(names) ^ set(attributes)
        wrong |= {n for n, v in attributes.items() if v is not None and self.attributes.get(n) != v}
        wrong |= {n for n in names if names.count(n) > 1}
        if wrong:
            raise GraphError(f"{op} (operator {self._at}) has an unexpected {min(wrong)!r}")
        if len(node.input) != len(inputs) or len(node.output) != outputs:
            raise GraphError(f"{op} (operator {self._at}) has unexpected inputs or outputs")
        weights = []
        for name, wanted in zip(node.input, inputs, strict=True):
            if isinstance(wanted, Weight):
                weights.append(self._weight(op, name, wanted))
            elif name != wanted:
                raise GraphError(f"{op} (operator {self._at}) takes an unexpected value")
        return list(node.output), weights

    def _weight(self, op: str, name: str, wanted: Weight) -> Array:
        tensor = self.weights.get(name)
        if tensor is None:
            raise GraphError(f"{op} (operator {self._at}) takes a value where a weight should be")
        self.used.add(name)
        array: Array = numpy_helper.to_array(tensor)
        same = len(array.shape) == len(wanted.shape) and all(
            size > 0 and expected in (size, ANY)
            for size, expected in zip(array.shape, wanted.shape, strict=True)
        )
        if array.dtype != wanted.dtype or not same:
            raise GraphError(f"{op} (operator {self._at}) has a weight of unexpected type or shape")
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise GraphError(f"{op} (operator {self._at}) has a weight that is not finite")
        return np.ascontiguousarray(array) if array.ndim else array

    def linear(self, x: str, inputs: int, outputs: int) -> tuple[str, Linear]:
        """x·W + b: the output's name, and the weights."""
        if self.int8:
            return self._quantized_linear(x, inputs, outputs)
        (product,), (weight,) = self.node("MatMul", x, floats(inputs, outputs))
        (out,), (bias,) = self.node("Add", product, floats(weight.shape[1]))
        return out, Linear(weight, bias, None)

    def _quantized_linear(self, x: str, inputs: int, outputs: int) -> tuple[str, Linear]:
        scalar = Weight(np.float32, ())
        (high,), _ = self.node("ReduceMax", x, axes=[-1], keepdims=1)
        (low,), _ = self.node("ReduceMin", x, axes=[-1], keepdims=1)
        (width,), _ = self.node("Sub", high, low)
        (step,), (steps,) = self.node("Mul", width, scalar)
        (step,), (least,) = self.node("Max", step, scalar)
        (above,), (below,) = self.node("Mul", step, scalar)
        (center,), _ = self.node("Add", low, above)
        (around,), _ = self.node("Sub", x, center)
        (within,), _ = self.node("Div", around, step)
        (product,), (weight, scale) = self.node(
            *("DynamicQuantizeMatMul", within, Weight(np.int8, (inputs, outputs)), floats(outputs), ""),
            domain=MICROSOFT,
        )
        (scaled,), _ = self.node("Mul", product, step)
        size = weight.shape[1]
        (moved,), (sums,) = self.node("Mul", center, floats(size))
        (shift,), (bias,) = self.node("Add", moved, floats(size))
        (out,), _ = self.node("Add", scaled, shift)
        if tuple(map(float, (steps, below, least))) != TOKEN_QUANTIZATION or len(scale) != size:
            raise GraphError(f"operator {self._at} belongs to a linear layer of unexpected form")
        if not np.array_equal(sums, center_sums(weight, scale)):
            raise GraphError(f"operator {self._at} has sums that do not match its weights")
        return out, Linear(weight, bias, scale)

    def norm(self, x: str, size: int) -> tuple[str, Norm]:
        """Layer norm: the output's name, and the weights."""
        (out,), (scale, shift) = self.node(
            "LayerNormalization", x, floats(size), floats(size), epsilon=None, axis=-1
        )
        epsilon = float(self.attributes["epsilon"])
        if not 0 <= epsilon <= 1:
            raise GraphError(f"LayerNormalization (operator {self._at}) has an unexpected 'epsilon'")
        return out, Norm(scale, shift, epsilon)

    def end(self) -> None:
        """Raise GraphError if there are more nodes."""
        if self._at != len(self._nodes):
            raise GraphError("unexpected operators at the end")

    def activation(self, x: str) -> tuple[str, str]:
        """An activation of a layer: the output's name, and the operator."""
        op = self.next_op()
        if op not in ACTIVATIONS:
            raise GraphError(f"its activation is {op!r}, not one of {', '.join(ACTIVATIONS)}")
        (out,), _ = self.node(op, x, domain="" if op == "Relu" else MICROSOFT)
        return out, op

    def is_called(self, value: str, name: str) -> None:
        """Raise GraphError unless an output of the segment has this name."""
        if value != name:
            raise GraphError(f"its output {name} is another value")
