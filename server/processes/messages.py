"""Encodes dataclasses, named tuples and arrays as JSON for messages between processes, and decodes them by type."""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import orjson
from pydantic import BaseModel

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """A value as JSON, where null stands for NaN; raises TypeError for values of other types than decode() makes."""
    return orjson.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """A value of a type that orjson does not know, by values of types that it knows."""
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, b64encode(value.tobytes()).decode()]
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    return str(value) if isinstance(value, Path) else value._asdict()


def decode(kind: type[T], value: Any) -> T:
    """The value of a type that encode() converted to this parsed JSON.

    Decodes dataclasses, named tuples, pydantic's models, paths and arrays, also within lists, mappings and optional
    values. Other values are neither checked nor copied, so long lists of numbers take no time.
    """
    make: Callable[[Any], T] | None = _maker(kind)  # type: ignore[arg-type]  # types are hashable
    return value if make is None else make(value)


# Decoders of generic types, given the decoder of their parts.
_GENERIC: dict[Any, Callable[[Callable[[Any], Any], Any], Any]] = {
    UnionType: lambda make, value: None if value is None else make(value),
    **dict.fromkeys((Sequence, list), lambda make, values: [make(value) for value in values]),
    **dict.fromkeys(
        (Mapping, dict), lambda make, values: {key: make(value) for key, value in values.items()}
    ),
}


@cache
def _maker(kind: Any) -> Callable[[Any], Any] | None:
    """The decoder of a type from parsed JSON; None if parsed JSON already is of this type."""
    if (origin := get_origin(kind)) is np.ndarray:
        return lambda row: np.frombuffer(b64decode(row[2]), row[0]).reshape(row[1])
    if origin in _GENERIC:
        *_, make = (_maker(part) for part in get_args(kind) if part is not NoneType)
        return make and partial(_GENERIC[origin], make)
    if not isinstance(kind, type):
        return None
    if is_dataclass(kind) or hasattr(kind, "_asdict"):
        makers = {name: make for name, part in get_type_hints(kind).items() if (make := _maker(part))}
        return lambda row: kind(**row | {name: make(row[name]) for name, make in makers.items()})
    if issubclass(kind, BaseModel):
        return kind.model_validate_json
    return kind if issubclass(kind, Path) else None
