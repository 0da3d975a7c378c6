"""Graphs built by export are accepted; with any other edge, attribute, constant, type or shape they are refused."""

import re
from collections.abc import Callable, Iterable, Iterator
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


STEP = 31  # every how many bytes one is changed


def with_other_bytes(model: onnx.ModelProto, weights: Iterable[Any]) -> Iterator[bytes]:
    """The file of a model, each time with one other byte outside of its weights, which may have any finite values."""
    data = model.SerializeToString()
    free = bytearray(len(data))
    for array in weights:
        for found in re.finditer(re.escape(array.tobytes()), data):
            free[slice(*found.span())] = bytes([1]) * array.nbytes
    for at in [n for n, is_free in enumerate(free) if not is_free][::STEP]:
        yield data[:at] + bytes([data[at] ^ (1, 2, 4)[at % 3]]) + data[at + 1 :]


def with_other_parts(model: onnx.ModelProto, weights: Iterable[Any]) -> Iterator[bytes]:
    """The file of a model with other lists in its graph, further attributes, and weights that are not finite."""
    graph = model.graph
    for items in (graph.node, graph.initializer, graph.input, graph.output, *(x.input for x in graph.node)):
        kept = list(items)
        for other in (kept[1:], [*kept, kept[-1]], kept[::-1]):
            del items[:]
            items.extend(other)
            yield model.SerializeToString()
        del items[:]
        items.extend(kept)
    for node in graph.node:
        for name in ("causal", *(a.name for a in node.attribute)):
            node.attribute.append(helper.make_attribute(name, 1))
            yield model.SerializeToString()
            del node.attribute[-1]
    data = model.SerializeToString()
    for array in weights:
        for value in (np.nan, np.inf) if array.dtype == np.float32 else ():
            odd = array.copy()
            odd.flat[-1] = value
            yield data.replace(array.tobytes(), odd.tobytes(), 1)


@pytest.mark.parametrize(
    "family",
    [
        "bert",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("deberta-v2", "electra", "modernbert", "mpnet")),
    ],
)
def test_one_change_is_enough_to_be_refused(family: str) -> None:
    for int8, old, layer in ((False, False, 0), (False, False, 1), (True, False, 1), (False, True, 2)):
        architecture, segments = built(family, int8, old)
        model = segments[layer]
        weights = read_segment(model, architecture, layer, old).values()
        for data in (*with_other_parts(deepcopy(model), weights), *with_other_bytes(model, weights)):
            try:
                found = read_model(data)
                read_segment(found, architecture, layer, old)
            except GraphError:
                continue
            assert found == model, f"int8: {int8}, schema 6: {old}, layer {layer}"


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
            kinds: dict[int, Any] = {field.TYPE_BYTES: b"x", field.TYPE_STRING: "x", field.TYPE_MESSAGE: {}}
            value = kinds.get(field.type, 1)
            is_list = hasattr(getattr(message, field.name), "append")
            before = type(message)()
            before.CopyFrom(message)  # another field of a oneof is cleared
            message.MergeFrom(type(message)(**{field.name: [value] if is_list else value}))
            with pytest.raises(GraphError, match=field.name):
                read_model(model.SerializeToString())
            message.CopyFrom(before)
    assert {("ModelProto", "functions"), ("TensorProto", "external_data"), ("branch", "initializer")} < fields
    assert read_model(model.SerializeToString()) == segment


def test_names_are_short_and_printable() -> None:
    segment = built("bert", False)[1][1]
    for name in (
        "x" * MAX_NAME,
        "x" * (MAX_NAME + 1),
        "x" * (MAX_VALUE_BYTES + 1),
        "x\x1b[31m",
        "\u00e9",
        "a\nb",
    ):
        for n in range(2):
            model = deepcopy(segment)
            (model, model.graph.node[0])[n].MergeFrom(
                (onnx.ModelProto(producer_name=name), onnx.NodeProto(op_type=name))[n]
            )
            if len(name) == MAX_NAME:
                assert read_model(model.SerializeToString()) == model
                continue
            with pytest.raises(GraphError, match=r"is not a name|of 1001 bytes"):
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
