"""Check of a segment's ONNX file: it may have only fields that export writes, limited in number and size.

A model is untrusted, so its file is checked before ONNX Runtime loads it. ONNX Runtime would read weights from any file
that a graph names, and it accepts functions, configurations and weights of branches, which no segment needs.
segment_graph.py then checks that the graph is the one that export builds.
"""

from typing import Any

import onnx

from de3.model_store.graph import OPSETS, GraphError

MAX_FIELDS = 10_000  # in a file; the largest file that export writes has about 400
MAX_VALUE_BYTES = 1000  # limit for a field that is neither a message nor a weight's data
MAX_NAME = 200  # characters
FIELDS = {
    "ModelProto": "ir_version producer_name graph opset_import",
    "GraphProto": "node name initializer input output",
    "branch": "node name output",
    "NodeProto": "input output op_type domain attribute",
    "AttributeProto": "name type i f ints g t",
    "TensorProto": "dims data_type name raw_data",
    "ValueInfoProto": "name type",
    "TypeProto": "tensor_type",
    "Tensor": "elem_type shape",
    "TensorShapeProto": "dim",
    "Dimension": "dim_value dim_param",
    "OperatorSetIdProto": "domain version",
}


def read_model(data: bytes) -> Any:
    """The ModelProto in a file; raises GraphError for anything that a segment may not contain."""
    try:
        _count_fields(memoryview(data), onnx.ModelProto.DESCRIPTOR, MAX_FIELDS)
        model = onnx.load_model_from_string(data)
    except GraphError:
        raise
    except Exception as error:  # protobuf has its own exception classes
        raise GraphError(f"not an ONNX model: {type(error).__name__}") from None
    _check_fields(model, "ModelProto")
    for opset in model.opset_import:
        if OPSETS.get(opset.domain) != opset.version:
            raise GraphError(f"it needs version {opset.version} of the operators {opset.domain!r}")
    return model


def _count_fields(data: memoryview, kind: Any, left: int) -> int:
    """Subtract the number of a message's fields, including nested ones, from `left`, and return the rest.

    Runs before parsing, because parsing turns a field of two bytes into an object of a hundred bytes. Raises GraphError
    for more than `left` fields, and for unknown, malformed and oversized ones.
    """
    at = 0
    while at < len(data):
        left -= 1
        if left < 0:
            raise GraphError(f"it has more than {MAX_FIELDS} fields")
        tag, at = _varint(data, at)
        field, wire, size = kind.fields_by_number.get(tag >> 3), tag & 7, 0
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise GraphError("not an ONNX model: it has a field of unknown type")
        if field is None:  # unknown to this release of onnx; ONNX Runtime might know it
            raise GraphError(f"it has a field {tag >> 3} that ONNX does not know")
        if at + size > len(data):
            raise GraphError("not an ONNX model: it has a truncated field")
        if wire == 2 and field.message_type is not None:
            left = _count_fields(data[at : at + size], field.message_type, left)
        elif size > MAX_VALUE_BYTES and field.name != "raw_data":
            raise GraphError(f"it has a name or list of {size} bytes")
        at += size
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at `at`, and the position after it; raises GraphError if it does not end within ten bytes."""
    value = 0
    for n, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, at + n + 1
    raise GraphError("not an ONNX model: it has an unterminated number")


def _check_fields(message: Any, kind: str) -> None:
    """Raise GraphError for a field that export does not write, or a name that is not short printable ASCII."""
    allowed = FIELDS.get(kind, "").split()
    for field, value in message.ListFields():
        if field.name not in allowed:
            raise GraphError(f"{kind} has the field {field.name}, which export does not write")
        if field.name == "raw_data":
            continue
        is_one = isinstance(value, str | bytes) or not hasattr(value, "__len__")
        for one in [value] if is_one else value:
            if field.message_type is not None:
                _check_fields(one, "branch" if field.name == "g" else field.message_type.name)
            elif isinstance(one, bytes) or (isinstance(one, str) and not _is_name(one)):
                raise GraphError(
                    f"{one[:MAX_NAME]!r} is not a name of at most {MAX_NAME} printable ASCII characters"
                )


def _is_name(text: str) -> bool:
    return len(text) <= MAX_NAME and text.isascii() and text.isprintable()
