"""A builder of ONNX graphs, node by node, with ONNX Runtime's fused operators.

Unlike tracing a PyTorch module, this yields the fused operators for fp32 and int8 with every version of PyTorch and
transformers.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from de3.model_store.graph_check import MICROSOFT, OPSETS
from de3.model_store.node_reader import TOKEN_QUANTIZATION, center_sums
from de3.training.encoders.weights import Array, Linear, Norm

# FastGelu is the tanh approximation, Gelu the exact one.
ACTIVATIONS = {"gelu": "Gelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu", "relu": "Relu"}


class Graph:
    """A builder of ONNX graphs: methods append nodes and return the name of the output."""

    def __init__(self, int8: bool, prefix: str = "") -> None:
        """All names start with `prefix`: a branch may not reuse names of the enclosing graph."""
        self.int8 = int8
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: list[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an input; a string in shape is a free dimension."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: list[int | str]) -> None:
        """Declare `value` as the output `name`."""
        for node in self.nodes:  # rename: an Identity node would copy
            node.input[:] = [name if x == value else x for x in node.input]
            node.output[:] = [name if x == value else x for x in node.output]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, array: NDArray[Any]) -> str:
        """Store a weight; returns its name."""
        name = f"{self.prefix}w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def node(self, op: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """Append an operator; "" omits an optional input. Returns the first output's name."""
        names = [f"{self.prefix}v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, domain=domain, **attributes))
        return names[0]

    def ms(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Append one of ONNX Runtime's own operators."""
        return self.node(op, *inputs, domain=MICROSOFT, outputs=outputs, **attributes)

    def linear(self, x: str, linear: Linear) -> str:
        """x·W + b; in int8 each token's activations are quantized with their own scale and center."""
        bias = self.constant(linear.bias)
        if not self.int8:
            return self.node("Add", self.node("MatMul", x, self.constant(linear.weight)), bias)
        # Each token's values are shifted and scaled to −128 … 127, so that the operator rounds them to integers.
        weight, scale = quantize(linear.weight)
        high = self.node("ReduceMax", x, axes=[-1], keepdims=1)
        low = self.node("ReduceMin", x, axes=[-1], keepdims=1)
        inverse_steps, steps_below, min_step = (
            self.constant(np.array(v, np.float32)) for v in TOKEN_QUANTIZATION
        )
        step = self.node("Max", self.node("Mul", self.node("Sub", high, low), inverse_steps), min_step)
        center = self.node("Add", low, self.node("Mul", step, steps_below))
        scaled = self.node("Div", self.node("Sub", x, center), step)
        product = self.ms("DynamicQuantizeMatMul", scaled, self.constant(weight), self.constant(scale), "")
        rescaled = self.node("Mul", product, step)
        shift = self.node("Add", self.node("Mul", center, self.constant(center_sums(weight, scale))), bias)
        return self.node("Add", rescaled, shift)

    def norm(self, x: str, norm: Norm) -> str:
        """Layer norm of x."""
        scale, shift = self.constant(norm.scale), self.constant(norm.shift)
        return self.node("LayerNormalization", x, scale, shift, epsilon=norm.epsilon, axis=-1)

    def activation(self, x: str, name: str) -> str:
        """A layer's activation function; `name` as in transformers."""
        op = ACTIVATIONS[name]
        return self.node(op, x) if op == "Relu" else self.ms(op, x)

    def branch(self, flag: str, yes: "Graph", no: "Graph", names: list[str], shape: list[int | str]) -> None:
        """Declare the outputs `names`: those of `yes` if the boolean `flag` is true, else those of `no`.

        Both branches may use this graph's values; their weights are added to it.
        """
        then_branch, else_branch = (helper.make_graph(g.nodes, g.prefix, [], g.outputs) for g in (yes, no))
        self.nodes.append(
            helper.make_node("If", [flag], names, then_branch=then_branch, else_branch=else_branch)
        )
        self.weights += yes.weights + no.weights
        self.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def model(self, name: str) -> onnx.ModelProto:
        """The finished, checked model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="de3", ir_version=8)
        onnx.checker.check_model(model)
        return model


def quantize(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 of weight (inputs, outputs) with one scale per output: weight ≈ int8 · scale."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127.0
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)
