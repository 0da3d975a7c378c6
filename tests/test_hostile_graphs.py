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
from onnx import TensorProto, helper, numpy_helper

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
Change = tuple[Place, str, Any]  # the path of a message, one of its fields, and another value for the field
Kind = tuple[Any, ...]


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
    message.ClearField(field)
    message.MergeFrom(type(message)(**{field: value}))
    try:
        yield
    finally:
        message.CopyFrom(before)


def others(field: Any, value: Any) -> list[Any]:
    """Other values for a field."""
    match value:
        case str():
            return [OTHER, ""]
        case bytes():
            return [value[:-1], value + b"\0"]
        case float():
            return [value + 0.5, value * 2, float("nan")]
    return [value + 1, value - 1, *([2**40] if field.type == field.TYPE_INT64 else [])]


def changes(
    message: Any, path: Place, names: list[str], free: set[bytes], seen: set[Kind]
) -> Iterator[Change]:
    """Changes to a message and to all messages in it.

    names: those of the values of its graph. free: the bytes of the weights, which may have any finite values. seen: the
    kinds of nodes and tensors that have had all changes, in this model or others; a further one has a single change.
    """
    kind: Kind = ()
    match message:
        case onnx.GraphProto():
            values = [x.name for x in message.input]
            values += [x for node in message.node for x in (*node.input, *node.output) if x]
            names = list(dict.fromkeys([*values, *(w.name for w in message.initializer)]))
        case onnx.NodeProto():
            if not any(a.HasField("g") for a in message.attribute):  # whose branches have kinds of their own
                kind = (message.op_type, len(message.input), len(message.output))
        case onnx.TensorProto():
            kind = (message.data_type, len(message.dims), message.raw_data in free)
    every = list(changes_of_fields(message, path, names, free, seen))
    if kind in seen:
        every = [every[(path[-1][1] or 0) % len(every)]]
    elif kind:
        seen.add(kind)
    yield from every


def changes_of_fields(
    message: Any, path: Place, names: list[str], free: set[bytes], seen: set[Kind]
) -> Iterator[Change]:
    if isinstance(message, onnx.NodeProto):
        for name in ("causal", *(a.name for a in message.attribute)):
            yield path, "attribute", [*message.attribute, helper.make_attribute(name, 1)]
    if isinstance(message, onnx.TensorProto):
        array = numpy_helper.to_array(message)
        if array.dtype == np.float32:
            yield from ((path, "raw_data", np.full_like(array, x).tobytes()) for x in (np.nan, np.inf))
        if message.raw_data not in free:
            for other in (array + 1, array - 1, array / 2 + 7):
                yield path, "raw_data", np.asarray(other, array.dtype).tobytes()
    for field, value in message.ListFields():
        if not hasattr(value, "__len__") or isinstance(value, str | bytes):
            if field.message_type is not None:
                yield from changes(value, (*path, (field.name, None)), names, free, seen)
            else:
                yield from ((path, field.name, other) for other in others(field, value))
            continue
        items = list(value)
        yield from ((path, field.name, other) for other in (items[1:], [*items, items[-1]], items[::-1]))
        for i, one in enumerate(items):
            if field.message_type is not None:
                yield from changes(one, (*path, (field.name, i)), names, free, seen)
                continue
            at = names.index(one) if one in names else 0
            neighbours = [names[at - 1], names[(at + 1) % len(names)]] if isinstance(one, str) else []
            for other in {*others(field, one), *neighbours}:
                yield path, field.name, [*items[:i], other, *items[i + 1 :]]


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("deberta-v2", "electra", "modernbert", "mpnet")),
    ],
)
def test_one_change_is_enough_to_be_refused(family: str) -> None:
    seen: set[Kind] = set()
    new = product((False, True), (False,), (0, 1))
    for int8, old, layer in (*new, (False, True, 1), (True, True, 2)):
        architecture, segments = built(family, int8, old)
        model = segments[layer]
        weights = read_segment(model, architecture, layer, old)
        free = {array.tobytes() for array in weights.values()}
        original, accepted, count = deepcopy(model), [], 0
        for path, field, value in changes(model, (), [], free, seen):
            with changed(model, path, field, value):
                if model == original:  # a list of one item, reversed
                    continue
                count += 1
                try:
                    read_segment(model, architecture, layer, old)
                except GraphError:
                    continue
                accepted.append(f"{path}.{field} = {value!r:.100}")
        assert not accepted, f"{family}, int8: {int8}, schema 6: {old}, layer {layer}"
        assert count > (100 if old else 40) and model == original


def messages(message: Any, path: Place = (), kind: str = "ModelProto") -> Iterator[tuple[str, Any, Place]]:
    """A message and all messages in it, each with its kind and path; the graph of an attribute is a branch."""
    yield kind, message, path
    for field, value in message.ListFields():
        if field.message_type is not None:
            inside = "branch" if field.name == "g" else field.message_type.name
            for n, one in enumerate(value) if hasattr(value, "__len__") else [(None, value)]:
                yield from messages(one, (*path, (field.name, n)), inside)


def test_a_field_that_export_does_not_write_is_refused() -> None:
    """ONNX has fields that name other files, define functions, or give a branch its own weights."""
    _, (_, segment, _) = built("bert", False, old=True)
    fields, model = set(), deepcopy(segment)
    for kind, message, path in messages(segment):
        for field in message.DESCRIPTOR.fields:
            if field.name in FIELDS[kind].split() or (kind, field.name) in fields:
                continue
            fields.add((kind, field.name))
            kinds: dict[int, Any] = {field.TYPE_BYTES: b"x", field.TYPE_STRING: "x", field.TYPE_MESSAGE: {}}
            value = kinds.get(field.type, 1)
            if hasattr(getattr(type(message)(), field.name), "append"):
                value = [value]
            with changed(model, path, field.name, value), pytest.raises(GraphError, match=field.name):
                read_model(model.SerializeToString())
    assert {("ModelProto", "functions"), ("TensorProto", "external_data"), ("branch", "initializer")} < fields
    assert read_model(model.SerializeToString()) == segment


def test_names_are_short_and_printable() -> None:
    model = deepcopy(built("bert", False)[1][1])
    model.graph.node[0].output[0] = "x" * MAX_NAME
    assert read_model(model.SerializeToString()) == model
    node = (("graph", None), ("node", 0))
    for name in ("x" * (MAX_NAME + 1), "x\x1b[31m", "\u00e9", "a\nb"):
        for path, field in (((), "producer_name"), (node, "op_type")):
            with changed(model, path, field, name), pytest.raises(GraphError, match="is not a name"):
                read_model(model.SerializeToString())
    model.graph.node[0].output[0] = "x" * (MAX_VALUE_BYTES + 1)
    with pytest.raises(GraphError, match=f"of {MAX_VALUE_BYTES + 1} bytes"):
        read_model(model.SerializeToString())


@pytest.mark.parametrize(
    ("family", "old"),
    [("bert", False), ("bert", True), ("modernbert", False), ("deberta-v2", False), ("mpnet", False)],
)
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


def row_numbers(distance: int, more: int, both_sides: bool) -> Callable[[Any], Any]:
    """Changes DeBERTa's row number of a distance, or of that distance in both directions."""

    def change(rows: Any) -> Any:
        rows, middle = rows.copy(), len(rows) // 2
        rows[middle - distance] -= more
        if both_sides:
            rows[middle + distance] = 16 - rows[middle - distance]
        return rows

    return change


ROWS: list[Callable[[Any], Any]]
ROWS = [lambda rows: rows[::-1], *(row_numbers(*x) for x in product((1, 20), (-1,), (False, True)))]
ROWS += [row_numbers(63, 2, both_sides) for both_sides in (False, True)]
FREQUENCIES: list[Callable[[Any], Any]]
FREQUENCIES = [lambda f: f * 2, lambda f: f[[0, 2, 1, *range(3, len(f))]], lambda f: np.r_[f[:-1], -1e-9]]


@pytest.mark.parametrize(
    ("family", "int8", "name", "change", "message"),
    [
        *(
            ("deberta-v2", False, None, change, "bucket numbers do not match its distances")
            for change in ROWS
        ),
        *(
            ("modernbert", True, "frequencies", change, "do not descend from 1 to 0")
            for change in FREQUENCIES
        ),
        ("bert", True, "qkv.scale", lambda x: np.full_like(x, 3e38), "qkv: its weights are too large"),
    ],
)
def test_tables_and_scales_have_only_values_that_export_writes(
    family: str, int8: bool, name: str | None, change: Callable[[Any], Any], message: str
) -> None:
    """name: of the weight; None: the row numbers of DeBERTa's distances."""
    architecture, segments = built(family, int8)
    model = deepcopy(segments[1])
    data = read_segment(model, architecture, 1)[name].tobytes() if name else None
    tensor = next(
        w
        for w in model.graph.initializer
        if w.raw_data == data or (not name and w.data_type == TensorProto.INT32)
    )
    array = numpy_helper.to_array(tensor)
    tensor.raw_data = np.asarray(change(array), array.dtype).tobytes()
    with pytest.raises(GraphError, match=message):
        read_segment(model, architecture, 1)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"positions": 0}, "positions"),
        ("bert", {"positions": 63}, "max_tokens must be at most 63"),
        ("deberta-v2", {"distances": 63}, "max_tokens must be at most 63"),
        ("bert", {"token_types": 1}, "token_types"),
        *(("bert", {"num_heads": heads}, "num_heads") for heads in (0, 3, 128)),
        ("roberta", {"width": 32}, "width"),
        ("distilbert", {"token_types": 2}, "token_types"),
        ("modernbert", {"positions": 64}, "positions"),
        ("modernbert", {"local_layers": [2, 2]}, "local_layers"),
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
