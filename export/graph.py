"""The parts of an ONNX segment, built node by node from weights with ONNX Runtime's fused operators.

Unlike tracing a PyTorch module, this yields the fused operators for fp32 and int8 with every version of
PyTorch and transformers.

A segment runs one unpadded sample:

    embeddings.onnx   input_ids (1, T) int64, token_type_ids (1, T) int64 if the encoder has token types
                      → hidden (1, T, H)
    layer_NN.onnx     hidden (1, T, H) → next_hidden (1, T, H)

If its layer has an exit, it also takes with_exit, a boolean, and returns logits (1, K). If the exit has
prototypes, it takes them, (K, D) with unit rows, and returns distances (1, K). Without with_exit these are zeros:
the exit is a branch, so a sample that cannot exit at a layer does not pay for it.
"""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from de3.export import deberta
from de3.model_store.node_reader import TOKEN_QUANTIZATION, center_sums
from de3.training.encoders.weights import Array, Disentangled, Embeddings, Head, Layer, Linear, Norm

MICROSOFT = "com.microsoft"
# FastGelu is the tanh approximation, Gelu the exact one.
ACTIVATIONS = {"gelu": "Gelu", "gelu_new": "FastGelu", "gelu_pytorch_tanh": "FastGelu", "relu": "Relu"}
HEAD_ACTIVATIONS = {"tanh": "Tanh", "relu": "Relu", "gelu": "Gelu"}


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
        """Store a weight."""
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
        """x·W + b; in int8 each token's activations are quantized with a scale and a center of their own."""
        bias = self.constant(linear.bias)
        if not self.int8:
            return self.node("Add", self.node("MatMul", x, self.constant(linear.weight)), bias)
        # Each token's values are moved and scaled to −128 … 127, so that the operator rounds them to whole numbers.
        weight, scale = quantize(linear.weight)
        high = self.node("ReduceMax", x, axes=[-1], keepdims=1)
        low = self.node("ReduceMin", x, axes=[-1], keepdims=1)
        steps, below, least = (self.constant(np.array(v, np.float32)) for v in TOKEN_QUANTIZATION)
        step = self.node("Max", self.node("Mul", self.node("Sub", high, low), steps), least)
        center = self.node("Add", low, self.node("Mul", step, below))
        within = self.node("Div", self.node("Sub", x, center), step)
        product = self.ms("DynamicQuantizeMatMul", within, self.constant(weight), self.constant(scale), "")
        scaled = self.node("Mul", product, step)
        shift = self.node("Add", self.node("Mul", center, self.constant(center_sums(weight, scale))), bias)
        return self.node("Add", scaled, shift)

    def norm(self, x: str, norm: Norm) -> str:
        """Layer norm of x."""
        scale, shift = self.constant(norm.scale), self.constant(norm.shift)
        return self.node("LayerNormalization", x, scale, shift, epsilon=norm.epsilon, axis=-1)

    def activation(self, x: str, name: str) -> str:
        """An activation of a layer by the name that transformers gives it."""
        op = ACTIVATIONS[name]
        return self.node(op, x) if op == "Relu" else self.ms(op, x)

    def branch(self, flag: str, yes: "Graph", no: "Graph", names: list[str], shape: list[int | str]) -> None:
        """Declare as outputs `names` those of `yes` if the boolean `flag` is true, else those of `no`.

        Both may use this graph's values; their weights are added to it.
        """
        then, other = (helper.make_graph(g.nodes, g.prefix, [], g.outputs) for g in (yes, no))
        self.nodes.append(helper.make_node("If", [flag], names, then_branch=then, else_branch=other))
        self.weights += yes.weights + no.weights
        self.outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def model(self, name: str) -> onnx.ModelProto:
        """The finished, checked model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, self.weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="de3", ir_version=8)
        onnx.checker.check_model(model)
        return model


def quantize(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """Symmetric int8 of weight (inputs, outputs) with one scale per output: weight ≈ int8 · scale."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127.0
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def embed(g: Graph, tables: Embeddings, ids: str, types: str | None) -> str:
    """Hidden states (1, T, H) of the embedding output."""
    if g.int8:
        # One scale per row. The cast follows the Gather, because ONNX Runtime would fold a DequantizeLinear
        # of the table into a float32 table when it loads the model.
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
    """Attention with values for the distance between query and key, (heads, 2P − 1), added to the scores."""
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

    head: what stands between pooling and classifier. final_norm: of the hidden states, before pooling.

    Heads stay in float32, except for the prototypical network's weights: they cost almost nothing.
    """
    labels = classifier.bias.shape[0]
    flag = g.input("with_exit", [], TensorProto.BOOL)
    yes, no = Graph(g.int8, "yes"), Graph(g.int8, "no")
    if pooling == "mean":
        seen = hidden if final_norm is None else yes.norm(hidden, final_norm)
        pooled = yes.node("ReduceMean", seen, axes=[1], keepdims=0)
    else:  # the norm of one token only
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
