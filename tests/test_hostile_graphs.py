"""Graphs built by export are accepted; with any other edge, attribute, constant, type or shape they are refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from de3.model_store.architecture import Architecture, Head
from de3.model_store.graph import GraphError, stored
from de3.model_store.graph_check import FIELDS, MAX_NAME, MAX_VALUE_BYTES, read_model
from de3.model_store.model import exit_weights
from de3.model_store.segment_graph import (
    build_old_segment,
    exit_tensors,
    graph_name,
    read_exits,
    read_segment,
)
from de3.model_store.store import Artifact, Store
from tests.fixtures import save_encoder

OTHER = "evil"
# Path of a message: fields, each with its index if it is a list, or else None.
Place = tuple[tuple[str, int | None], ...]


@cache
def artifact_of(family: str, int8: bool) -> Artifact:
    """A small random classifier with exits."""
    from tests.stock import with_random_exits  # imports PyTorch

    folder = save_encoder(Path(mkdtemp()), family, layers=2, labels=3)
    return with_random_exits(folder, Store(folder / "store"), "m", "int8" if int8 else "fp32")


@cache
def built(family: str, int8: bool, old: bool = False) -> tuple[Architecture, list[onnx.ModelProto]]:
    """The architecture and segments of `artifact_of`; old: those of schema 6, which have its exits."""
    artifact = artifact_of(family, int8)
    architecture, exits = artifact.manifest.architecture, exit_weights(artifact)
    segments = []
    for layer, name in enumerate(architecture.segment_files()):
        segment = read_model(artifact.read(name))
        if old:
            weights = read_segment(segment, architecture, layer) | exits[layer]
            segment = build_old_segment(architecture, layer, stored(weights)).model(graph_name(layer))
        segments.append(segment)
    return architecture, segments


@contextmanager
def changed(model: onnx.ModelProto, path: Place, field: str, value: Any) -> Iterator[None]:
    """Change a field of the message at a path of the model, and restore it afterwards."""
    message: Any = model
    for name, i in path:
        message = getattr(message, name) if i is None else getattr(message, name)[i]
    before = type(message)()
    before.CopyFrom(message)
    if isinstance(value, list):
        message.ClearField(field)
        getattr(message, field).extend(value)
    else:
        setattr(message, field, value)
    try:
        yield
    finally:
        message.CopyFrom(before)


def others(attribute: AttributeProto) -> Iterator[tuple[str, Any]]:
    """Changes to an attribute, as (field, value): other values, another name and other types."""
    if attribute.ints:
        yield "ints", [attribute.ints[0] + 1, *attribute.ints[1:]]
        yield "ints", [*attribute.ints, 0]
    if attribute.type == AttributeProto.FLOAT:
        yield from (("f", attribute.f + 0.5), ("f", attribute.f * 2), ("f", float("nan")))
    if attribute.type == AttributeProto.INT:
        yield from (("i", attribute.i + 1), ("i", attribute.i - 1), ("i", 2**40))
    yield from (("name", OTHER), ("type", AttributeProto.STRING), ("floats", [1.0]))


def graphs_in(model: onnx.ModelProto) -> Iterator[tuple[Any, Place]]:
    """The main graph and its branches, each with its path."""
    yield model.graph, (("graph", None),)
    for n, node in enumerate(model.graph.node):
        for a, attribute in enumerate(node.attribute):
            if attribute.HasField("g"):
                yield attribute.g, (("graph", None), ("node", n), ("attribute", a), ("g", None))


def changes(
    model: onnx.ModelProto, constants: set[str], seen: set[tuple[Any, ...]]
) -> Iterator[tuple[Place, str, Any]]:
    """Changes to a model, each as the path of a message, one of its fields, and another value for the field.

    constants: names of the initializers that are not weights. seen: the kinds of nodes and initializers that have had
    all changes, in this model or others; a further one of such a kind has a single change.
    """

    def once(kind: tuple[Any, ...], number: int, every: list[Any]) -> list[Any]:
        if kind in seen:
            return [every[number % len(every)]]
        seen.add(kind)
        return every

    for graph, path in graphs_in(model):
        values = [x.name for x in graph.input] + [x for n in graph.node for x in (*n.input, *n.output) if x]
        values = list(dict.fromkeys([*values, *(w.name for w in graph.initializer)]))
        nodes = list(graph.node)
        yield path, "name", OTHER
        yield from ((path, "node", other) for other in (nodes[:-1], [*nodes, nodes[-1]], nodes[::-1]))
        outputs = list(graph.output)
        yield from ((path, "output", other) for other in ([*outputs, outputs[0]], outputs[1:]))
        for n, node in enumerate(nodes):
            kind = (node.op_type, len(node.input), len(node.output))
            yield from once(kind, n, list(changes_of_node(node, (*path, ("node", n)), values)))
        for kind in ("input", "output"):
            for i, value in enumerate(getattr(graph, kind)):
                at = (*path, (kind, i))
                tensor = (*at, ("type", None), ("tensor_type", None))
                yield at, "name", OTHER
                yield tensor, "elem_type", TensorProto.DOUBLE
                for d, dim in enumerate(value.type.tensor_type.shape.dim):
                    yield (*tensor, ("shape", None), ("dim", d)), "dim_value", dim.dim_value + 1
    tensors = list(model.graph.initializer)
    for w, tensor in enumerate(tensors):
        is_constant = tensor.name in constants
        kind = (tensor.data_type, len(tensor.dims), is_constant)
        at = (("graph", None), ("initializer", w))
        yield from once(kind, w, list(changes_of_tensor(tensor, at, is_constant)))
    for other in (tensors[1:], [*tensors[1:], tensors[0]], [*tensors, tensors[0]]):
        yield (("graph", None),), "initializer", other
    yield (), "ir_version", 9
    yield (), "producer_name", OTHER
    yield (), "opset_import", [helper.make_opsetid("", 17)]


def changes_of_tensor(tensor: Any, at: Place, is_constant: bool) -> Iterator[tuple[Place, str, Any]]:
    """Changes to an initializer, as in `changes`."""
    array = numpy_helper.to_array(tensor)
    if is_constant:
        for other in (array + 1, array - 1, array / 2 + 7):
            if np.asarray(other, array.dtype).tobytes() != tensor.raw_data:
                yield at, "raw_data", np.asarray(other, array.dtype).tobytes()
    yield at, "name", OTHER
    yield at, "dims", [*tensor.dims, 1]
    yield at, "dims", [*tensor.dims[:-1], tensor.dims[-1] + 1] if tensor.dims else [2]
    yield at, "data_type", TensorProto.UINT8
    yield from ((at, "raw_data", data) for data in (tensor.raw_data[:-1], tensor.raw_data + b"\0"))
    if array.dtype == np.float32:
        yield from ((at, "raw_data", np.full_like(array, x).tobytes()) for x in (np.nan, np.inf))


def changes_of_node(node: Any, path: Place, values: list[str]) -> Iterator[tuple[Place, str, Any]]:
    """Changes to a node, as in `changes`. values: names of the graph's values."""
    yield path, "op_type", "Identity"
    yield path, "domain", OTHER
    for kind in ("input", "output"):
        names = list(getattr(node, kind))
        yield path, kind, [*names, values[0]]
        for i, name in enumerate(names):
            at = values.index(name) if name in values else 0
            for other in {values[at - 1], values[(at + 1) % len(values)], "", OTHER} - {name}:
                yield path, kind, [*names[:i], other, *names[i + 1 :]]
    attributes = list(node.attribute)
    yield path, "attribute", [*attributes, helper.make_attribute("causal", 1)]
    for i, attribute in enumerate(attributes):
        yield path, "attribute", attributes[:i] + attributes[i + 1 :]
        yield path, "attribute", [*attributes, attribute]
        at = (*path, ("attribute", i))
        if attribute.HasField("t"):
            yield (*at, ("t", None)), "raw_data", attribute.t.raw_data[:-4] + b"\0\0\x80\x3f"
            yield (*at, ("t", None)), "dims", [*attribute.t.dims, 1]
        elif not attribute.HasField("g"):
            yield from ((at, field, value) for field, value in others(attribute))


@pytest.mark.parametrize(
    ("family", "int8", "old"),
    [
        *product(["bert"], (False, True), (False, True)),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in product(("deberta-v2", "electra", "modernbert", "mpnet"), (False, True), (False, True))
        ),
    ],
)
def test_one_change_is_enough_to_be_refused(family: str, int8: bool, old: bool) -> None:
    architecture, segments = built(family, int8, old)
    seen: set[tuple[Any, ...]] = set()
    for layer, model in enumerate(segments):
        weights = read_segment(model, architecture, layer, old)
        # A constant is an initializer that is not a weight; here, one whose bytes are not those of any weight.
        free = {array.tobytes() for array in weights.values()}
        constants = {w.name for w in model.graph.initializer if w.raw_data not in free}
        original, accepted, count = deepcopy(model), [], 0
        for path, field, value in changes(original, constants, seen):
            with changed(model, path, field, value):
                if model == original:  # a list of one node, reversed
                    continue
                count += 1
                try:
                    read_segment(model, architecture, layer, old)
                except GraphError:
                    continue
                accepted.append(f"{path}.{field} = {value!r:.100}")
        assert not accepted, f"{family}, layer {layer}"
        assert count > (100 if old else 40) and model == original


def messages(message: Any, kind: str = "ModelProto") -> Iterator[tuple[str, Any]]:
    """A message and all messages in it, each with its kind; the graph of an attribute is a branch."""
    yield kind, message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if hasattr(value, "__len__") else [value]:
                yield from messages(one, "branch" if field.name == "g" else field.message_type.name)


def test_a_field_that_export_does_not_write_is_refused() -> None:
    """ONNX has fields that name other files, define functions, or give a branch its own weights."""
    _, (_, segment, _) = built("bert", False, old=True)
    fields = set()
    for kind, message in messages(model := deepcopy(segment)):
        for field in message.DESCRIPTOR.fields:
            if field.name in FIELDS[kind].split() or (kind, field.name) in fields:
                continue
            fields.add((kind, field.name))
            before = type(message)()
            before.CopyFrom(message)
            value = {field.TYPE_BYTES: b"x", field.TYPE_STRING: "x"}.get(field.type, 1)
            inside = getattr(message, field.name)
            if field.message_type is not None:
                inside.add() if hasattr(inside, "add") else inside.SetInParent()
            elif hasattr(inside, "append"):
                inside.append(value)
            else:
                setattr(message, field.name, value)
            with pytest.raises(GraphError, match=field.name):
                read_model(model.SerializeToString())
            message.CopyFrom(before)
    assert {("ModelProto", "functions"), ("TensorProto", "external_data"), ("branch", "initializer")} < fields
    assert read_model(model.SerializeToString()) == segment


@pytest.mark.parametrize("name", ["x" * (MAX_NAME + 1), "x\x1b[31m", "\u00e9", "a\nb"])
def test_names_are_short_and_printable(name: str) -> None:
    _, (_, segment, _) = built("bert", False)
    model = deepcopy(segment)
    model.graph.node[0].output[0] = "x" * MAX_NAME
    assert read_model(model.SerializeToString()) == model
    for message, field in ((model, "producer_name"), (model.graph.node[0], "op_type")):
        kept = getattr(message, field)
        setattr(message, field, name)
        with pytest.raises(GraphError, match="is not a name"):
            read_model(model.SerializeToString())
        setattr(message, field, kept)
    model.graph.node[0].output[0] = "x" * (MAX_VALUE_BYTES + 1)
    with pytest.raises(GraphError, match=f"of {MAX_VALUE_BYTES + 1} bytes"):
        read_model(model.SerializeToString())


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2", "mpnet"])
@pytest.mark.parametrize("old", [False, True])
def test_a_manifest_of_another_model_is_refused(family: str, old: bool) -> None:
    """Without a graph of the exits, their pooling and their head's activation are those of the manifest."""
    architecture, segments = built(family, False, old)
    tensors = exit_tensors(exit_weights(artifact_of(family, False)))
    encoder = architecture.encoder
    changes: list[dict[str, Any]] = [
        *({"head": None}, {"labels": ["a", "b"]}, {"metric_dim": 32}, {"precision": "int8"}),
        *({"exit_layers": [1, 2]}, {"prototype_layers": [0]}),
    ]
    if old:
        changes += [{"pooling": "cls"}, {"head": Head(pooling="mean", activation="relu", norm=1e-3)}]
    for name, value in encoder:
        if name in ("type", "num_layers", "width", "hidden_size"):
            continue
        other = value * 2 if isinstance(value, int | float) else "relu" if name == "activation" else value[1:]
        if other != value:
            changes.append({"encoder": encoder.model_copy(update={name: other})})
    for change in changes:
        other_model = architecture.model_copy(update=change)
        with pytest.raises(GraphError):
            for layer, segment in enumerate(segments):
                read_segment(segment, other_model, layer, old)
            if not old:
                read_exits(tensors, other_model)


def replaced(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> onnx.ModelProto:
    """A copy of a model in which `change` is applied to one initializer, an array. name: the initializer's name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(w for w in copy.graph.initializer if w.name == name)
    array = numpy_helper.to_array(tensor).copy()
    tensor.raw_data = np.asarray(change(array), array.dtype).tobytes()
    return copy


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows[::-1].copy(), lambda rows: np.r_[rows[:-1], 16], lambda rows: np.r_[-1, rows[1:]]],
)
def test_distances_are_numbered_by_buckets(change: Callable[[Any], Any]) -> None:
    architecture, segments = built("deberta-v2", False)
    rows = next(w.name for w in segments[1].graph.initializer if w.data_type == TensorProto.INT32)
    with pytest.raises(GraphError, match="bucket numbers do not match its distances"):
        read_segment(replaced(segments[1], rows, change), architecture, 1)


@pytest.mark.parametrize(
    "change", [lambda f: f * 2, lambda f: f[::-1], lambda f: f - 0.5, lambda f: np.r_[f[:-1], -1e-9]]
)
def test_frequencies_descend(change: Callable[[Any], Any]) -> None:
    architecture, segments = built("modernbert", True)
    frequencies = read_segment(segments[1], architecture, 1)["frequencies"].tobytes()
    name = next(w.name for w in segments[1].graph.initializer if w.raw_data == frequencies)
    with pytest.raises(GraphError, match="do not descend from 1 to 0"):
        read_segment(replaced(segments[1], name, change), architecture, 1)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"positions": 0}, "positions"),
        ("bert", {"positions": 63}, "max_tokens must be at most 63"),
        ("mpnet", {"distances": 63}, "max_tokens must be at most 63"),
        ("deberta-v2", {"distances": 63}, "max_tokens must be at most 63"),
        ("bert", {"token_types": 1}, "token_types"),
        *(("bert", {"num_heads": heads}, "num_heads") for heads in (0, 3, 65, 128, -4)),
        ("roberta", {"width": 32}, "width"),
        ("distilbert", {"token_types": 2}, "token_types"),
        ("modernbert", {"token_types": 2}, "token_types"),
        ("modernbert", {"positions": 64}, "positions"),
        ("modernbert", {"local_layers": [2, 2]}, "local_layers"),
        ("modernbert", {"local_layers": [3]}, "local_layers"),
        ("modernbert", {"num_heads": 64}, "num_heads"),
        ("deberta-v2", {"terms": ["c2p", "c2p"]}, "terms"),
        ("deberta-v2", {"terms": ["p2c", "c2p"]}, "terms"),
    ],
)
def test_an_inconsistent_encoder_is_refused(family: str, change: Any, message: str) -> None:
    raw = built(family, False)[0].model_dump()
    raw["encoder"] |= change
    with pytest.raises(ValueError, match=message):
        Architecture.model_validate(raw)


def test_sums_that_overflow_are_refused() -> None:
    architecture, segments = built("bert", True)
    scale = read_segment(segments[1], architecture, 1)["qkv.scale"].tobytes()
    name = next(w.name for w in segments[1].graph.initializer if w.raw_data == scale)
    with pytest.raises(GraphError, match="qkv: its weights are too large"):
        read_segment(replaced(segments[1], name, lambda x: np.full_like(x, 3e38)), architecture, 1)
