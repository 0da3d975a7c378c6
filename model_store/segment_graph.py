"""The graphs of a segment, which is the embeddings or a transformer block, and of an exit.

A segment runs one unpadded sample:

    embeddings.onnx   input_ids (1, T) int64, token_type_ids (1, T) int64 if the encoder has token types
                      → hidden (1, T, H)
    layer_NN.onnx     hidden (1, T, H) → next_hidden (1, T, H)

The weights of all exits are in exits.safetensors, so that the segments of models with the same encoder are equal. The
graph of an exit is built from them when the model is loaded: hidden (1, T, H) → logits (1, K), or (T, K) for a token
classifier. If the exit has prototypes, it also takes prototypes (K, D), with unit rows, and returns distances (1, K).

In artifacts of schema 6, an exit is a branch of its segment, which takes with_exit, a boolean, as well, and returns
logits and distances, too.

A file is checked by building its segment again from the weights in the file: everything else must be equal. A list of
allowed operators would not be enough: allowed operators could form a graph that takes any amount of time or memory, or
that has a backdoor triggered by one word. Only the values of the weights are free.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from de3.model_store.architecture import Architecture
from de3.model_store.graph import Array, Graph, GraphError, Source


def build_segment(architecture: Architecture, layer: int, source: Source) -> Graph:
    """The graph of a layer, with weights from a source: those of `Encoder.embed` (layer 0) or `Encoder.block`."""
    encoder = architecture.encoder
    shape: list[int | str] = [1, "tokens", architecture.hidden_size]
    g = Graph(architecture.precision == "int8", source)
    if layer == 0:
        ids = g.input("input_ids", [1, "tokens"], TensorProto.INT64)
        types = g.input("token_type_ids", [1, "tokens"], TensorProto.INT64) if encoder.token_types else ""
        g.output(encoder.embed(g, ids, types), "hidden", shape)
    else:
        g.output(encoder.block(g, g.input("hidden", shape), layer), "next_hidden", shape)
    return g


def build_exit(architecture: Architecture, layer: int, source: Source) -> Graph:
    """The graph of a layer's exit, with weights from a source.

    They are classifier (hidden, labels), space (hidden, metric_dim), final_norm, and a stock classifier's dense and
    norm. In an int8 artifact, only the prototypical network (space) is int8: the rest costs almost nothing in float32.
    """
    g = Graph(architecture.precision == "int8", source)
    hidden = g.input("hidden", [1, "tokens", architecture.hidden_size])
    shape: list[int | str] = ["tokens" if architecture.is_spans else 1, len(architecture.labels)]
    for name, value in _exit_outputs(g, g, hidden, architecture, layer).items():
        g.output(value, name, shape)
    return g


def graph_name(layer: int) -> str:
    """The name of a segment's graph."""
    return f"layer_{layer}" if layer else "embeddings"


def _exit_outputs(
    g: Graph, outer: Graph, hidden: str, architecture: Architecture, layer: int
) -> dict[str, str]:
    """Append an exit to a graph; returns its logits and, with prototypes, its distances, by name.

    outer: the graph that takes the prototypes.
    """
    encoder, labels, size = architecture.encoder, len(architecture.labels), architecture.hidden_size
    metric = architecture.metric_dim
    head = architecture.head if layer == architecture.num_layers else None
    pooling = (head or architecture).pooling
    if pooling in ("mean", "none"):
        pooled = g.norm(hidden, "final_norm", size, encoder.epsilon) if encoder.FINAL_NORM else hidden
        if pooling == "mean":
            pooled = g.node("ReduceMean", pooled, axes=[1], keepdims=0)
        else:
            pooled = g.node("Squeeze", pooled, g.constant([0]))
    else:  # the norm is computed for one token only
        pooled = g.node("Gather", hidden, g.constant(0), axis=1)
        pooled = g.norm(pooled, "final_norm", size, encoder.epsilon) if encoder.FINAL_NORM else pooled
    top = pooled
    if head is not None:
        top = g.activation(g.row(pooled, "dense", size, size), head.activation)
        top = top if head.norm is None else g.norm(top, "norm", size, head.norm)
    outputs = {"logits": g.row(top, "classifier", size, labels)}
    if layer in architecture.prototype_layers:
        prototypes = outer.input("prototypes", [labels, metric])
        # 1 − cos: the prototypes are unit vectors, so only h' is normalized.
        unit = g.node("LpNormalization", g.linear(pooled, "space", size, metric), axis=1, p=2)
        one = g.constant([1], np.float32)
        outputs["distances"] = g.node("Gemm", unit, prototypes, one, alpha=-1.0, transB=1)
    return outputs


def build_old_segment(architecture: Architecture, layer: int, source: Source) -> Graph:
    """The graph of a layer in schema 6, with its exit: the input with_exit, the outputs logits and maybe distances.

    The outputs are zeros if with_exit is false.
    """
    g = build_segment(architecture, layer, source)
    if layer not in architecture.exit_layers:
        return g
    shape: list[int | str] = [1, len(architecture.labels)]
    flag = g.input("with_exit", [], TensorProto.BOOL)
    yes, no = Graph(g.int8, source, "yes"), Graph(g.int8, source, "no")
    outputs = _exit_outputs(yes, g, g.outputs[0].name, architecture, layer)
    for name, value in outputs.items():
        yes.output(value, f"yes_{name}", shape)
        zeros = numpy_helper.from_array(np.zeros((1, len(architecture.labels)), np.float32))
        no.output(no.node("Constant", value=zeros), f"no_{name}", shape)
    g.branch(flag, yes, no, list(outputs), shape)
    return g


def read_segment(
    model: ModelProto, architecture: Architecture, layer: int, has_exits: bool = False
) -> dict[str, Array]:
    """The weights in a segment's file by name; raises GraphError unless export would have built it from them.

    model: a ModelProto that `graph_check.read_model` has accepted. has_exits: the artifact has schema 6, so that its
    exits' weights are in its segments.
    """
    declared = {tensor.name: tensor for tensor in model.graph.initializer}

    def take(tensor: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
        proto = declared.get(tensor)
        if proto is None:
            raise GraphError(f"it has no weight {tensor} ({name})")
        return proto, _values(proto, name, np.dtype(dtype), shape)

    g = (build_old_segment if has_exits else build_segment)(architecture, layer, take)
    _compare(model, g, graph_name(layer))
    return g.weights


def read_exits(tensors: Mapping[str, Array], architecture: Architecture) -> dict[int, dict[str, Array]]:
    """The weights of the exits by layer, from the tensors of exits.safetensors; raises GraphError for invalid ones."""
    known: set[str] = set()

    def source_of_layer(layer: int) -> Source:
        def take(_: str, name: str, dtype: type, shape: tuple[int, ...]) -> tuple[TensorProto, Array]:
            full, wanted = tensor_name(layer, name), np.dtype(dtype)
            known.add(full)
            array = tensors.get(full)
            if array is None:
                raise GraphError(f"it has no tensor {full}")
            if array.dtype != wanted or array.shape != shape:
                found = f"{array.dtype} of shape {list(array.shape)[:10]}"
                raise GraphError(f"{full} must be {wanted} of shape {list(shape)}, got {found}")
            if wanted.kind == "f" and not np.isfinite(array).all():
                raise GraphError(f"{full} is not finite")
            return TensorProto(), array

        return take

    weights = {
        layer: build_exit(architecture, layer, source_of_layer(layer)).weights
        for layer in architecture.exit_layers
    }
    if unknown := sorted(tensors.keys() - known):
        raise GraphError(f"it has an unexpected tensor {unknown[0][:100]!r}")
    return weights


def exit_tensors(exits: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
    """The tensors of exits.safetensors, from the weights of each exit by layer."""
    return {
        tensor_name(layer, name): np.ascontiguousarray(array)
        for layer, weights in exits.items()
        for name, array in weights.items()
    }


def tensor_name(layer: int, name: str) -> str:
    """The name in exits.safetensors of a weight of a layer's exit."""
    return f"layer_{layer:02}.{name}"


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
