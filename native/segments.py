"""An artifact's int8 segments for the kernels: what they need of the ONNX graphs that ONNX Runtime runs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from native import NoKernelsError, kernels

Array = NDArray[Any]
PRODUCT = ["DynamicQuantizeMatMul", "Add", "LayerNormalization"]
LAYER = ["DynamicQuantizeLinear", "QAttention", *PRODUCT, "DynamicQuantizeMatMul", "Gelu", *PRODUCT]
NONE = np.zeros(0, np.float32)


class _Graph:
    """A segment's nodes and weights, looked up by position and name."""

    def __init__(self, data: bytes) -> None:
        graph = onnx.load_model_from_string(data).graph
        self.weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
        self.nodes = [node for node in graph.node if node.op_type != "If"]
        branches = [node for node in graph.node if node.op_type == "If"]
        self.exit = []
        if branches:
            self.exit = list(next(a.g for a in branches[0].attribute if a.name == "then_branch").node)

    def ops(self) -> list[str]:
        return [node.op_type for node in self.nodes]

    def weight(self, node: Any, place: int) -> Array:
        name = node.input[place]
        if name not in self.weights:
            raise NoKernelsError(f"{node.op_type} takes {name!r}, which is not a weight")
        return np.ascontiguousarray(self.weights[name])


def _attribute(node: Any, name: str) -> Any:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def load(files: list[bytes], mean: bool, exits: set[int]) -> Any:
    """A kernels' model of the segments in files, index = layer; raises NoKernelsError.

    mean: whether exits see the mean of the tokens, else the first one. exits: the layers that have one.
    """
    if not kernels.supported():
        raise NoKernelsError("this processor has neither AMX nor AVX-512 VNNI")
    try:
        graphs = [_Graph(data) for data in files]
        if {number for number, graph in enumerate(graphs) if graph.exit} != exits:
            raise NoKernelsError("the graphs have other exits than the manifest")
        return _build(graphs, mean)
    except NoKernelsError:
        raise
    except Exception as error:  # a graph of another shape than ours can fail anywhere in here
        raise NoKernelsError(f"{type(error).__name__}: {error}") from None


def _build(graphs: list[_Graph], mean: bool) -> Any:
    for graph in graphs[1:]:
        if [op.replace("Relu", "Gelu") for op in graph.ops()] != LAYER:
            raise NoKernelsError(f"a layer has the operators {graph.ops()}")
    first = graphs[1]
    hidden, heads = first.weight(first.nodes[1], 1).shape[0], _attribute(first.nodes[1], "num_heads")
    inner, gelu = first.weight(first.nodes[5], 1).shape[1], first.nodes[6].op_type == "Gelu"
    model = kernels.new(hidden, heads, inner, len(graphs) - 1, gelu, mean)
    _set_embeddings(model, graphs[0])
    for number, graph in enumerate(graphs):
        if number:
            _set_layer(model, number, graph)
        if graph.exit:
            _set_exit(model, number, graph)
    return model


def _set_embeddings(model: Any, graph: _Graph) -> None:
    ops = ["Gather", "Cast", "Gather", "Mul", "Shape", "Slice", "Add"]
    types = ["Gather", "Add"] if "token_type_ids" in {x for n in graph.nodes for x in n.input} else []
    if graph.ops() != [*ops, *types, "LayerNormalization"]:
        raise NoKernelsError(f"the embeddings have the operators {graph.ops()}")
    nodes = graph.nodes
    kind = graph.weight(nodes[7], 0) if types else NONE
    kernels.set_embeddings(
        model,
        graph.weight(nodes[0], 0),
        graph.weight(nodes[2], 0),
        graph.weight(nodes[5], 0),
        kind,
    )
    _set_norm(model, 0, 0, graph, nodes[-1])


def _set_norm(model: Any, number: int, which: int, graph: _Graph, node: Any) -> None:
    kernels.set_norm(
        model, number, which, graph.weight(node, 1), graph.weight(node, 2), _attribute(node, "epsilon")
    )


def _set_layer(model: Any, number: int, graph: _Graph) -> None:
    _, attention, out, _, norm, up, _, down, _, last = graph.nodes
    set_linear: Callable[..., None] = kernels.set_linear
    weight, bias, scale = (graph.weight(attention, place) for place in (1, 2, 4))
    set_linear(model, number, 0, weight, scale, bias)
    for which, node in ((1, out), (2, up), (3, down)):
        weight, scale, bias = (graph.weight(node, place) for place in (1, 2, 4))
        set_linear(model, number, which, weight, scale, bias)
    _set_norm(model, number, 0, graph, norm)
    _set_norm(model, number, 1, graph, last)


def _set_exit(model: Any, number: int, graph: _Graph) -> None:
    gemm = graph.exit[1]
    classifier, bias = graph.weight(gemm, 1), graph.weight(gemm, 2)
    space = [NONE, NONE, NONE]
    ops = [node.op_type for node in graph.exit]
    if ops[2:] == ["DynamicQuantizeMatMul", "LpNormalization", "Gemm"]:
        space = [graph.weight(graph.exit[2], place) for place in (1, 2, 4)]
    elif ops[2:]:
        raise NoKernelsError(f"an exit has the operators {ops}")
    kernels.set_exit(model, number, np.ascontiguousarray(classifier.T), bias, *space)
