"""The graph of a segment: the embeddings or a transformer block, and the exit if the layer has one.

A segment runs one unpadded sample:

    embeddings.onnx   input_ids (1, T) int64, token_type_ids (1, T) int64 if the encoder has token types
                      → hidden (1, T, H)
    layer_NN.onnx     hidden (1, T, H) → next_hidden (1, T, H)

If the layer has an exit, the segment also takes with_exit, a boolean, and returns logits (1, K). If the exit has
prototypes, the segment also takes prototypes (K, D), with unit rows, and returns distances (1, K). The exit is a
branch, so a sample that cannot exit at a layer does not pay for it; if with_exit is false, logits and distances are
zeros.

A file is checked by building its segment again from the weights in the file: everything else must be equal. A list of
allowed operators would not be enough: allowed operators could form a graph that takes any amount of time or memory, or
that has a backdoor triggered by one word. Only the values of the weights are free.
"""

from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from de3.model_store.architecture import Architecture
from de3.model_store.graph import Array, Graph, GraphError, Source


def build_segment(architecture: Architecture, layer: int, source: Source) -> Graph:
    """The graph of a layer and its exit, with weights from a source; layer 0 is the embeddings.

    The weights are those listed in `Encoder.embed` or `Encoder.block`, and those of the exit: classifier (hidden,
    labels), space (hidden, metric_dim), final_norm, and a stock classifier's dense and norm.
    """
    encoder = architecture.encoder
    shape: list[int | str] = [1, "tokens", architecture.hidden_size]
    g = Graph(architecture.precision == "int8", source)
    if layer == 0:
        ids = g.input("input_ids", [1, "tokens"], TensorProto.INT64)
        types = g.input("token_type_ids", [1, "tokens"], TensorProto.INT64) if encoder.token_types else ""
        g.output(encoder.embed(g, ids, types), "hidden", shape)
    else:
        g.output(encoder.block(g, g.input("hidden", shape), layer), "next_hidden", shape)
    if layer in architecture.exit_layers:
        _add_exit(g, architecture, layer, source)
    return g


def graph_name(layer: int) -> str:
    """The name of a segment's graph."""
    return f"layer_{layer}" if layer else "embeddings"


def _add_exit(g: Graph, architecture: Architecture, layer: int, source: Source) -> None:
    """Add an exit: the input with_exit, the outputs logits and, with prototypes, distances.

    In an int8 artifact, only the prototypical network of an exit is int8. The rest costs almost nothing in float32.
    """
    encoder, labels, size = architecture.encoder, len(architecture.labels), architecture.hidden_size
    hidden, metric = g.outputs[0].name, architecture.metric_dim
    head = architecture.head if layer == architecture.num_layers else None
    flag = g.input("with_exit", [], TensorProto.BOOL)
    yes, no = Graph(g.int8, source, "yes"), Graph(g.int8, source, "no")
    if (head or architecture).pooling == "mean":
        seen = yes.norm(hidden, "final_norm", size, encoder.epsilon) if encoder.FINAL_NORM else hidden
        pooled = yes.node("ReduceMean", seen, axes=[1], keepdims=0)
    else:  # the norm is computed for one token only
        pooled = yes.node("Gather", hidden, yes.constant(0), axis=1)
        pooled = yes.norm(pooled, "final_norm", size, encoder.epsilon) if encoder.FINAL_NORM else pooled
    top = pooled
    if head is not None:
        top = yes.activation(yes.row(pooled, "dense", size, size), head.activation)
        top = top if head.norm is None else yes.norm(top, "norm", size, head.norm)
    yes.output(yes.row(top, "classifier", size, labels), "yes_logits", [1, labels])
    names = ["logits"]
    if layer in architecture.prototype_layers:
        prototypes = g.input("prototypes", [labels, metric])
        # 1 − cos: the prototypes are unit vectors, so only h' is normalized.
        unit = yes.node("LpNormalization", yes.linear(pooled, "space", size, metric), axis=1, p=2)
        one = yes.constant([1], np.float32)
        distances = yes.node("Gemm", unit, prototypes, one, alpha=-1.0, transB=1)
        yes.output(distances, "yes_distances", [1, labels])
        names.append("distances")
    for name in names:
        zeros = numpy_helper.from_array(np.zeros((1, labels), np.float32))
        no.output(no.node("Constant", value=zeros), f"no_{name}", [1, labels])
    g.branch(flag, yes, no, names, [1, labels])


def read_segment(model: ModelProto, architecture: Architecture, layer: int) -> dict[str, Array]:
    """The weights in a segment's file by name; raises GraphError unless export would have built it from them.

    model: a ModelProto that `graph_check.read_model` has accepted.
    """
    declared = {tensor.name: tensor for tensor in model.graph.initializer}

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
        proto = declared.get(tensor)
        if proto is None:
            raise GraphError(f"it has no weight {tensor} ({name})")
        return proto, _values(proto, name, np.dtype(dtype), shape)

    g = build_segment(architecture, layer, take)
    _compare(model, g, graph_name(layer))
    return g.weights


def _values(tensor: TensorProto, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """The values of a tensor in a file; raises GraphError unless they are of this type and shape, and finite."""
    where, size = f"the weight {tensor.name} ({name})", dtype.itemsize * int(np.prod(shape))
    wanted = helper.np_dtype_to_tensor_dtype(dtype)
    if tensor.data_type != wanted:
        raise GraphError(f"{where} must be {dtype} (type {wanted}), got type {tensor.data_type}")
    if tuple(tensor.dims) != shape:
        raise GraphError(f"{where} must be {dtype} of shape {list(shape)}, got {list(tensor.dims)[:10]}")
    data = tensor.raw_data  # each access makes a copy
    if len(data) != size:
        raise GraphError(f"{where} has {len(data)} bytes, expected {size}")
    array: Array = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise GraphError(f"{where} is not finite")
    return array


def _compare(model: ModelProto, g: Graph, name: str) -> None:
    """Raise GraphError, naming the first difference, unless the model equals `g` in all but the weights' values."""
    graph, expected = model.graph, g.model(name, [])
    for number, (node, wanted) in enumerate(zip(graph.node, expected.graph.node, strict=False), 1):
        if node.op_type != wanted.op_type:
            operator = f"{node.domain}.{node.op_type}".lstrip(".")
            raise GraphError(f"operator {number} is {operator}, not {wanted.op_type}")
        if node != wanted:
            raise GraphError(f"operator {number}, {node.op_type}, has unexpected {_difference(node, wanted)}")
    if len(graph.node) != len(expected.graph.node):
        raise GraphError(f"it has {len(graph.node)} operators, not {len(expected.graph.node)}")
    for tensor, made in zip(graph.initializer, g.tensors, strict=False):
        if tensor.name != made.name or (tensor.name not in g.declared and tensor != made):
            raise GraphError(f"the constant {made.name} differs from the one that export writes")
    if len(graph.initializer) != len(g.tensors):
        raise GraphError(f"it has {len(graph.initializer)} weights and constants, not {len(g.tensors)}")
    for part in ("input", "output"):
        if getattr(graph, part) != getattr(expected.graph, part):
            raise GraphError(f"its {part}s differ from those that export writes")
    file, wanted_file = (
        (m.graph.name, m.ir_version, m.producer_name, list(m.opset_import)) for m in (model, expected)
    )
    if file != wanted_file:
        raise GraphError("its name, producer or versions are not those that export writes")


def _difference(node: Any, wanted: Any) -> str:
    """The first field or attribute in which two nodes with the same operator differ."""
    attributes = {a.name: a for a in wanted.attribute}
    wrong = [a.name for a in node.attribute if attributes.pop(a.name, None) != a]
    fields = [f for f in ("domain", "input", "output") if getattr(node, f) != getattr(wanted, f)]
    first = next(iter(fields + wrong + list(attributes)), "")
    return repr(first[:100]) if first else "order of attributes"
