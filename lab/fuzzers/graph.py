"""Fuzzer of the weights' files: edits of the segments and exits of two small artifacts, in fp32 and int8.

The segments are also those of schema 6, whose exits are in them.

A file must be accepted, or refused with a GraphError. Accepted files that ONNX Runtime cannot load are only counted.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from hypothesis import strategies as st
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from de3.model_store.graph import GraphError, stored
from de3.model_store.graph_check import MAX_FIELDS, read_model
from de3.model_store.manifest import EXITS
from de3.model_store.model import exit_graph, exit_weights, read_segments
from de3.model_store.segment_graph import build_old_segment, graph_name, read_exits, read_segment
from lab.fuzzers.edits import spliced
from lab.fuzzers.run import Finding, Fuzzer
from lab.fuzzers.seeds import tiny

MAX_MESSAGE = 2000
PRECISIONS: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
NAMES = (
    "",
    "hidden",
    "logits",
    "distances",
    "next_hidden",
    "with_exit",
    "input_ids",
    "a" * 300,
    "\x00",
    "é",
    "axis",
)
OPERATORS = (
    "Add",
    "Gather",
    "If",
    "Loop",
    "Gemm",
    "MatMul",
    "Constant",
    "Cast",
    "Identity",
    "Attention",
    "Evil",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 64, 2**31, 2**62, -(2**63))
FRAGMENTS = (
    *(
        b"\x0a\x00",
        b"\x08\x01",
        b"\x80" * 11,
        b"\xff" * 9 + b"\x01",
        b"\x0b\x0c",
        b"\x3a\x02\x0a\x00",
        b"\x12\x00",
    ),
    *(
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\x3a\x00" * 20,
        b"\x0a\x02" * 50,
        b"\xa2\x06\x00",
        b"\x0d\x00\x00\x00\x00",
    ),
)


def _messages(message: Any) -> Iterator[Any]:
    """A message and all messages inside it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                yield from _messages(one)


def _value(draw: st.DrawFn, field: Any, old: Any) -> Any:
    """A new value for a field that is not a message."""
    match old:
        case str():
            return draw(st.sampled_from([*NAMES, *OPERATORS]))
        case bytes() if field.name == "raw_data":
            return draw(st.sampled_from([old[:-1], old + b"\0", b"", bytes(len(old)), b"\xff" * len(old)]))
        case bytes():
            return draw(st.binary(max_size=5))
        case float():
            return draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]))
    if field.enum_type is not None:
        return draw(st.sampled_from(sorted(field.enum_type.values_by_number)))
    limit = 2**31 if field.type == field.TYPE_INT32 else 2**63
    return draw(st.sampled_from([n for n in (*NUMBERS, old + 1, old - 1) if -limit <= n < limit]))


def _edit(draw: st.DrawFn, model: Any) -> None:
    """Change one field of one message, or replace the message by another of its type."""
    messages = list(_messages(model))
    message = draw(st.sampled_from(messages))
    fields = message.ListFields()
    kind = draw(st.sampled_from(["value", "value", "clear", "more", "swap", "new", "copy"]))
    if kind == "copy":  # another message of the same type
        copy = type(message)()
        copy.CopyFrom(draw(st.sampled_from([m for m in messages if m.DESCRIPTOR is message.DESCRIPTOR])))
        message.CopyFrom(copy)
    elif kind == "new" or not fields:
        _add(message, draw(st.sampled_from(list(message.DESCRIPTOR.fields))))
    else:
        field, value = draw(st.sampled_from(fields))
        if kind == "clear":
            message.ClearField(field.name)
        elif field.is_repeated:
            _edit_list(draw, kind, field, value)
        elif field.message_type is None:
            setattr(message, field.name, _value(draw, field, value))


def _add(message: Any, field: Any) -> None:
    """Set a field, or add an entry to a repeated field."""
    place = getattr(message, field.name)
    if field.message_type is not None:
        _ = place.add() if field.is_repeated else place.SetInParent()
        return
    is_text = field.cpp_type == field.CPPTYPE_STRING
    value: Any = 1 if not is_text else "a" if field.type == field.TYPE_STRING else b"a"
    if field.is_repeated:
        place.append(value)
    else:
        setattr(message, field.name, value)


def _edit_list(draw: st.DrawFn, kind: str, field: Any, value: Any) -> None:
    """Lengthen a repeated field, swap two of its entries, or change or remove one."""
    at, other = (draw(st.integers(0, len(value) - 1)) for _ in range(2))
    if kind == "more":
        value.extend([value[at]] * draw(st.sampled_from([1, 20])))
    elif kind == "swap":
        entries = list(value)
        entries[at], entries[other] = entries[other], entries[at]
        copies = [deepcopy(entry) for entry in entries]
        del value[:]
        value.extend(copies)
    elif field.message_type is None:
        value[at] = _value(draw, field, value[at])
    else:
        del value[at]


@cache
def _valid() -> list["File"]:
    """Every file of both artifacts, and every segment of schema 6."""
    files = []
    for precision in PRECISIONS:
        artifact = tiny(precision)
        exits = exit_weights(artifact)
        files.append(File(precision, None, artifact.read(EXITS)))
        for layer, (data, weights) in enumerate(read_segments(artifact)):
            old = build_old_segment(artifact.manifest, layer, stored(weights | exits.get(layer, {})))
            files.append(File(precision, layer, data))
            files.append(File(precision, layer, old.model(graph_name(layer)).SerializeToString(), True))
    return files


@dataclass(frozen=True)
class File:
    """A file, and its place in one of the artifacts.

    Attributes:
        layer: the segment's layer; None: the exits' file.
        is_old: a segment of schema 6.
    """

    precision: Literal["fp32", "int8"]
    layer: int | None
    data: bytes
    is_old: bool = False


def _edit_tensors(draw: st.DrawFn, tensors: dict[str, Any]) -> None:
    """Remove, add or change one tensor of the exits' file."""
    name, other = (draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    array = tensors[name]
    kind = draw(st.sampled_from(["remove", "add", "swap", "type", "shape", "value"]))
    if kind == "remove":
        del tensors[name]
    elif kind == "add":
        tensors[draw(st.sampled_from([*NAMES, name + "x", name.replace("layer_0", "layer_9")]))] = array
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], array
    elif kind == "type":
        with np.errstate(all="ignore"):  # 1e9 in another type
            tensors[name] = array.astype(
                draw(st.sampled_from([np.float16, np.float64, np.int8, np.int64, np.bool_]))
            )
    elif kind == "shape":
        tensors[name] = draw(st.sampled_from([array[None], array[:0], array[1:], array.ravel(), array.T]))
    elif array.size:
        values = array.copy()
        choices = [0, 1e9, np.nan, np.inf] if array.dtype.kind == "f" else [0, 1]
        values.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(choices))
        tensors[name] = values


@st.composite
def _files(draw: st.DrawFn) -> File:
    file = draw(st.sampled_from(_valid()))
    data = file.data
    kind = draw(st.sampled_from("mmmmbbn"))
    if kind == "m" and file.layer is None:
        tensors = load_tensors(data)
        for _ in range(draw(st.sampled_from([1, 1, 2]))):
            _edit_tensors(draw, tensors)
        data = save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    elif kind == "m":
        model = onnx.load_model_from_string(data)
        for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
            _edit(draw, model)
        data = model.SerializeToString()
    elif kind == "b":
        data = draw(spliced(data, FRAGMENTS))
    else:  # messages inside messages, or very many fields
        depth = draw(st.sampled_from([10, 200, 3000]))
        inner = draw(st.binary(max_size=3))
        for _ in range(depth):
            inner = b"\x3a" + _varint(len(inner)) + inner if depth < 1000 else b"\x3a\x00" + inner
        data = draw(st.sampled_from([b"", data])) + inner * draw(
            st.sampled_from([1, 2, MAX_FIELDS // depth + 1])
        )
    return replace(file, data=data)


def _varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def _parsed(file: File) -> Any:
    """The model or the tensors in a file; raises GraphError for any other file."""
    if file.layer is not None:
        return read_model(file.data)
    try:
        return load_tensors(file.data)
    except Exception as error:  # as in a server; see model_store/model.py
        raise GraphError(f"not a safetensors file: {type(error).__name__}") from None


def _graphs(file: File, parsed: Any) -> list[bytes]:
    """The graphs that a server runs for a file; raises GraphError if it refuses the file."""
    manifest = tiny(file.precision).manifest
    if file.layer is not None:
        read_segment(parsed, manifest, file.layer, file.is_old)
        return [file.data]
    return [exit_graph(manifest, layer, weights) for layer, weights in read_exits(parsed, manifest).items()]


def check(file: File) -> tuple[dict[str, float], str]:
    """Read a file as a server does, and load it in ONNX Runtime if it is accepted and was changed."""
    steps, outcome = 0.0, "not a graph"
    try:
        parsed = _parsed(file)
        steps, outcome = 1.0, "not of the model"
        graphs = _graphs(file, parsed)
    except GraphError as error:
        if len(str(error)) > MAX_MESSAGE:
            raise Finding(f"a message of {len(str(error))} characters") from None
        return {"steps": steps}, outcome
    if file in _valid():
        return {"steps": 2.0}, "original"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        for graph in graphs:
            onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception:  # in a server, the process that tests a model reports this as a StoreError
        return {"steps": 3.0}, "accepted, but does not load"
    return {"steps": 3.0}, "accepted"


FUZZER = Fuzzer(_files(), check, _valid)
