"""What a segment's ONNX file may hold. A model may come from anywhere, so this is checked before anything
runs it.

ONNX Runtime would read weights from any file that a graph names, and runs loops without end and tensors
without limit. A segment needs none of that: the operators below are those that export/graph.py builds with.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import onnx

MICROSOFT = "com.microsoft"
OPSETS = {"": 17, MICROSOFT: 1}
_ONNX = "Add Cast Constant DynamicQuantizeLinear Gather Gemm If LayerNormalization LpNormalization MatMul Mul"
_MORE = "ReduceMean Relu Shape Slice"
_MICROSOFT = "Attention DynamicQuantizeMatMul FastGelu Gelu QAttention"
OPERATORS = {"": frozenset(f"{_ONNX} {_MORE}".split()), MICROSOFT: frozenset(_MICROSOFT.split())}
MAX_NODES = 64  # of a segment; the largest that export builds has 21
MAX_DEPTH = 1  # of branches


class GraphError(ValueError):
    """A graph that is not run; the message says why."""


def read_graph(data: bytes) -> Any:
    """The GraphProto in a file; raises GraphError for what a segment may not hold."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf raises its own classes
        raise GraphError(f"not an ONNX model: {type(error).__name__}") from None
    if model.functions or model.training_info:
        raise GraphError("it has functions or training steps of its own")
    for opset in model.opset_import:
        if OPSETS.get(opset.domain) != opset.version:
            raise GraphError(f"it needs version {opset.version} of the operators {opset.domain[:50]!r}")
    nodes = 0
    for graph, depth in _graphs(model.graph, 0):
        if depth > MAX_DEPTH:
            raise GraphError("it has branches inside of branches")
        if graph.sparse_initializer:
            raise GraphError("it has sparse weights")
        nodes += len(graph.node)
        if nodes > MAX_NODES:
            raise GraphError(f"it has more than {MAX_NODES} operators")
        _check_tensors(graph.initializer)
        for node in graph.node:
            if node.op_type not in OPERATORS.get(node.domain, ()):
                name = f"{node.domain}.{node.op_type}".lstrip(".")
                raise GraphError(f"the operator {name[:100]!r} is not one that a segment is made of")
            for attribute in node.attribute:
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or attribute.ref_attr_name:
                    raise GraphError(f"{node.op_type} has an attribute that is not allowed")
                _check_tensors((*((attribute.t,) if attribute.HasField("t") else ()), *attribute.tensors))
    return model.graph


def _graphs(graph: Any, depth: int) -> Iterator[tuple[Any, int]]:
    yield graph, depth
    if depth > MAX_DEPTH:
        return
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _graphs(inner, depth + 1)


def _check_tensors(tensors: Iterable[Any]) -> None:
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.DEFAULT or tensor.external_data:
            raise GraphError(f"the tensor {tensor.name[:100]!r} is kept in another file")
