"""Reads the weights of a model from untrusted safetensors files, by name, as float32, without PyTorch."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from de3.model_store.sizes import read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
MAX_SHARDS, MAX_TENSORS = 1000, 20_000
MAX_HEADER_BYTES = 2**24
MAX_ELEMENTS = 2**29  # limit on the size of one weight
READ_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16
# Buffers, and parts of the encoder that a classifier does not use.
UNUSED = ("position_ids", "token_type_ids", "inv_freq", "pooler.dense.weight", "pooler.dense.bias")


class StateFile(Mapping[str, NDArray[np.float32]]):
    """The encoder's weights in float32, by their names in transformers; each is read from its file on access.

    Attributes:
        whole: the weights of the whole classifier.
    """

    def __init__(self, tensors: dict[str, "_Tensor"], prefix: str, read: set[str]) -> None:
        """read: set to which the name of each tensor is added when it is read."""
        self._tensors, self._prefix, self._read = tensors, prefix, read
        self.whole = StateFile(tensors, "", read) if prefix else self

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        full = self._prefix + name
        array = self._tensors[full].read(full)
        self._read.add(full)
        return array

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def outside(self) -> list[str]:
        """The names of the weights outside the encoder, such as those of another kind of head."""
        return [name for name in self._tensors if not name.startswith(self._prefix)]

    def check_all_read(self, others: Collection[str] = ()) -> None:
        """Raise ValueError if a weight outside UNUSED and `others` was not read: config.json is of another model."""
        read = self._read | set(others)
        if unread := [name for name in self._tensors if name not in read and not name.endswith(UNUSED)]:
            raise ValueError(
                f"its weights include {min(unread)!r:.100}, which a model of this type does not use: config.json "
                "and weights do not match"
            )


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file whose header the safetensors library has checked.

    Attributes:
        at: byte offset of its values in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    at: int

    def read(self, name: str) -> NDArray[np.float32]:
        """The values in float32; raises ValueError for an unsupported type or shape, or values that are not finite."""
        if self.dtype not in READ_TYPES:
            raise ValueError(
                f"its weights are {self.dtype:.20}; de3 reads {', '.join(READ_TYPES)}: save them as one of these"
            )
        if not 1 <= len(self.shape) <= 2 or min(self.shape) < 1 or prod(self.shape) > MAX_ELEMENTS:
            raise ValueError(f"its weight {name} has the shape {list(self.shape)[:10]}")
        values = np.fromfile(self.path, READ_TYPES[self.dtype], prod(self.shape), offset=self.at)
        if self.dtype == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        array = values.astype(np.float32, copy=False).reshape(self.shape)
        if not np.isfinite(array).all():
            raise ValueError(f"its weight {name} has values that are not finite")
        return array


def opened(folder: Path, prefix: str, may_lack_prefix: bool = False) -> StateFile:
    """Open the weights in a folder; raises ValueError for unusable files.

    prefix: prefix of the names of the encoder's weights. may_lack_prefix: the names may also lack it, as they do in a
    file that has only an encoder.
    """
    tensors: dict[str, _Tensor] = {}
    for path in _weight_files(folder):
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > MAX_HEADER_BYTES:
                    raise ValueError(f"its header has {size} bytes; at most {MAX_HEADER_BYTES} are allowed")
                header = json.loads(file.read(size))
            safe_open(path, "numpy")  # checks the header against the file
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"its {path.name} cannot be read: {error}") from None
        for key, entry in header.items():
            if key != "__metadata__":
                # Old checkpoints use TensorFlow's names for the weights of a norm.
                name = key.replace("LayerNorm.gamma", "LayerNorm.weight")
                name = name.replace("LayerNorm.beta", "LayerNorm.bias")
                begin = 8 + size + entry["data_offsets"][0]
                tensors[name] = _Tensor(path, entry["dtype"], tuple(entry["shape"]), begin)
        if len(tensors) > MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS} weights")
    if may_lack_prefix and not any(name.startswith(prefix) for name in tensors):
        prefix = ""
    return StateFile(tensors, prefix, set())


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights in a folder, sharded or not.

    Raises ValueError if there are none, or if the index of the shards is invalid.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"it has no {WEIGHTS}")
    index = read_config(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"its {INDEX} has no weight_map")
    shards = sorted(set(names.values()))
    are_beside = all(Path(shard).match(SHARDS) and "/" not in shard for shard in shards)
    if not are_beside or len(shards) > MAX_SHARDS:
        raise ValueError(f"its {INDEX} names files that are not weights in the same folder")
    return [folder / shard for shard in shards]


def save(tensors: dict[str, NDArray[Any]], file: Path) -> None:
    """Write a safetensors file; raises OSError if it cannot be written."""
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:  # including a full disk
        raise OSError(f"{file}: cannot be written: {error}") from None
