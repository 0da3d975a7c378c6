"""A builder of ONNX graphs, node by node, with ONNX Runtime's fused operators.

Unlike tracing a PyTorch module, this yields the fused operators for fp32 and int8 with every version of PyTorch and
transformers. The same code builds graphs for export and for comparison with a file; only the source of the weights
differs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
OPSETS = {"": 17, MICROSOFT: 1}
IR_VERSION = 8

# Activations are quantized dynamically and asymmetrically, per token, to −128 … 127. The three values are the size of
# a step relative to the range of the token's activations; the distance of the center, which becomes 0, from the lowest
# activation, in steps; and the minimum size of a step, because all activations may be equal.
TOKEN_QUANTIZATION = (1 / 255, 128.0, 1e-30)

# gelu is exact; gelu_tanh is its tanh approximation.
OPERATORS = {"gelu": "Gelu", "gelu_tanh": "FastGelu", "relu": "Relu", "tanh": "Tanh"}

# Returns a weight's tensor and values, given the tensor's name, and the weight's name, type and shape. Raises KeyError
# or GraphError if there is no such weight, and ValueError if its type or shape is wrong.
Source = Callable[[str, str, type, tuple[int, ...]], tuple[TensorProto, Array]]


class GraphError(ValueError):
    """An invalid graph; the message gives the reason."""


class Graph:
    """A builder of ONNX graphs: methods append nodes and return the name of the output.

    Attributes:
        weights: the weights that the graph takes from its source, by name.
        tensors: weights and constants, in the order of their names in the graph.
        declared: names of the tensors that are weights.
    """

    def __init__(self, int8: bool, source: Source, prefix: str = "") -> None:
        """int8: quantize linear layers. prefix: start of generated names; in a branch, not that of the outer graph."""
        self.int8, self._source, self._prefix = int8, source, prefix
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.tensors: list[TensorProto] = []
        self.declared: set[str] = set()
        self.weights: dict[str, Array] = {}

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an input; a string in `shape` names a dynamic dimension."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str]) -> None:
        """Declare `value` as the output `name`."""
        for node in self.nodes:  # rename: an Identity node would copy
            node.input[:] = [name if x == value else x for x in node.input]
            node.output[:] = [name if x == value else x for x in node.output]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """Add a constant; returns its name."""
        name = f"{self._prefix}w{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value, dtype, order="C"), name))
        return name

    def weight(self, name: str, *shape: int, dtype: type = np.float32) -> str:
        """Add a weight from the source, and its values to `weights[name]`; returns its name in the graph."""
        tensor = f"{self._prefix}w{len(self.tensors)}"
        proto, self.weights[name] = self._source(tensor, name, dtype, shape)
        self.tensors.append(proto)
        self.declared.add(tensor)
        return tensor

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append an operator; "" omits an optional input. Returns the first output's name."""
        names = [f"{self._prefix}v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def ms(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Append one of ONNX Runtime's own operators; see `node`."""
        return self.node(op, *inputs, domain=MICROSOFT, **attributes)

    def split(self, x: str, parts: int) -> list[str]:
        """Split the last dimension into equal parts; returns their names."""
        first = self.node("Split", x, axis=-1, outputs=parts).removesuffix("_0")
        return [f"{first}_{i}" for i in range(parts)]

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """x·W + b; in int8, the activations are quantized dynamically and asymmetrically, per token.

        Raises GraphError if the int8 weights are too large.
        """
        bias = self.weight(f"{name}.bias", outputs)
        if not self.int8:
            return self.node(
                "Add", self.node("MatMul", x, self.weight(f"{name}.weight", inputs, outputs)), bias
            )
        # Each token's values are shifted and scaled to −128 … 127, so that the operator rounds them to integers.
        high = self.node("ReduceMax", x, axes=[-1], keepdims=1)
        low = self.node("ReduceMin", x, axes=[-1], keepdims=1)
        inverse_steps, steps_below, min_step = (self.constant(v, np.float32) for v in TOKEN_QUANTIZATION)
        step = self.node("Max", self.node("Mul", self.node("Sub", high, low), inverse_steps), min_step)
        center = self.node("Add", low, self.node("Mul", step, steps_below))
        scaled = self.node("Div", self.node("Sub", x, center), step)
        weight = self.weight(f"{name}.weight", inputs, outputs, dtype=np.int8)
        product = self.ms("DynamicQuantizeMatMul", scaled, weight, self.weight(f"{name}.scale", outputs), "")
        rescaled = self.node("Mul", product, step)
        sums = center_sums(self.weights[f"{name}.weight"], self.weights[f"{name}.scale"])
        if not np.isfinite(sums).all():
            raise GraphError(f"{name}: its weights are too large")
        shift = self.node("Add", self.node("Mul", center, self.constant(sums, np.float32)), bias)
        return self.node("Add", rescaled, shift)

    def row(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """x·W + b for rows x (rows, inputs), always in float32; for layers that are small beside the encoder's."""
        weight = self.weight(f"{name}.weight", inputs, outputs)
        return self.node("Gemm", x, weight, self.weight(f"{name}.bias", outputs))

    def norm(self, x: str, name: str, size: int, epsilon: float) -> str:
        """Layer norm of x."""
        scale, shift = self.weight(f"{name}.weight", size), self.weight(f"{name}.bias", size)
        return self.node("LayerNormalization", x, scale, shift, epsilon=epsilon, axis=-1)

    def activation(self, x: str, name: str) -> str:
        """Apply an activation function; name: a key of OPERATORS."""
        op = OPERATORS[name]
        return self.ms(op, x) if op.endswith("Gelu") else self.node(op, x)

    def branch(self, flag: str, yes: "Graph", no: "Graph", names: list[str], shape: list[int | str]) -> None:
        """Declare the outputs `names`: those of `yes` if the boolean `flag` is true, else those of `no`.

        Both branches may use this graph's values; the branches' weights are added to this graph.
        """
        then_branch, else_branch = (helper.make_graph(g.nodes, g._prefix, [], g.outputs) for g in (yes, no))
        self.nodes.append(
            helper.make_node("If", [flag], names, then_branch=then_branch, else_branch=else_branch)
        )
        for g in (yes, no):
            self.tensors += g.tensors
            self.declared |= g.declared
            self.weights |= g.weights
        self.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def model(self, name: str, tensors: list[TensorProto] | None = None) -> onnx.ModelProto:
        """The finished model. tensors: used instead of the graph's weights and constants, unless None."""
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, self.tensors if tensors is None else tensors
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, producer_name="de3", ir_version=IR_VERSION)


def center_sums(weight: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Column sums of int8 weights (inputs, outputs), each times its output's scale, (outputs,); may be infinite.

    A token's x·W is the product of its shifted activations, plus its center times these sums.
    """
    with np.errstate(over="ignore"):
        return np.asarray(scale * weight.sum(0, dtype=np.int32).astype(np.float32))


def quantize(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weight (inputs, outputs) to symmetric int8 with one scale per output: weight ≈ int8 · scale."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127.0
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def source_of(weights: dict[str, Array]) -> Source:
    """A source for export: takes float32 weights by name, and quantizes those that the graph asks for in int8.

    A linear layer has one scale per output; the word table has one scale per row.
    """
    scales: dict[str, Array] = {}

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
        array = scales[name] if name in scales else weights[name]
        if dtype is np.int8:
            is_table = name == "word.weight"
            array, scale = quantize(np.ascontiguousarray(array.T) if is_table else array)
            scales[name.replace(".weight", ".scale")] = scale[:, None] if is_table else scale
            array = array.T if is_table else array
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, expected {shape}")
        array = np.asarray(array, order="C")
        return numpy_helper.from_array(array, tensor), array

    return take


def stored(weights: Mapping[str, Array]) -> Source:
    """A source that takes weights as they are, by name, in the types of an artifact; raises KeyError without one."""

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
        return numpy_helper.from_array(weights[name], tensor), weights[name]

    return take
