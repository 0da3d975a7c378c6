"""Records of live traffic, to which exits are fitted: the pooled states and full-depth answers of texts.

A server writes them (`de3 serve --learn`); its fits and `de3 import --records` read them. The states of layer 0 are
nearly a bag of words, so a file of records is user data.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from de3.exits.spans import Layout
from de3.model_store.fitted import MOST_PIECES, Marks, Pieces, client_hash
from de3.model_store.manifest import Manifest
from de3.model_store.regular_file import write_private_file
from de3.model_store.segments import Tokens

MAX_RECORDS = 1_000_000
MAX_CLIENTS = 2**16
MAX_FILE_BYTES = 2**32
MAX_NUMBER = 2**53
MAX_METADATA = 2**23  # bytes
FORMAT = "de3-records-1"
MOST_TOKENS = 512  # of a token classifier's text; longer ones are not recorded
SPECIAL, SUBWORD = 1 << 30, 1 << 29  # flags in Records.ids


@dataclass(frozen=True)
class Records:
    """Records of n texts, in the order of the traffic.

    Attributes:
        base: hash of the model's weights and tokenizer; see manifest.base_of.
        states: mean over the tokens after each layer but the last, from layer 0 on, (n, num_layers, hidden) float16; of
            a token classifier, after layer 0 only, (n, 1, hidden).
        logits: logits at full depth, (n, K) float32; of a token classifier, empty.
        ids: of a token classifier, the tokens of each text (see packed), then −1, (n, MOST_TOKENS) int32; otherwise
            empty.
        shares: probability with which each text was drawn, (n,) float64.
        extra: true for texts that were not drawn, but that an upstream has answered; no sample of the traffic, so they
            cannot test exits, (n,) bool.
        keys: hash of each text's tokens, (n,) uint64.
        numbers: estimated position of each text in the traffic, ascending, (n,) int64.
        clients: index of each text's client in `names`, (n,) int32.
        pieces: the word pieces of each text, (n, MOST_PIECES); see fitted.pieces_of.
        spreads: of the tokens after layer 0, (n,) float32; see fitted.Marks.
        names: names of the clients.
        texts: estimated number of texts of each client, recorded or not; in the order of `names`.
    """

    base: str
    states: NDArray[np.float16]
    logits: NDArray[np.float32]
    shares: NDArray[np.float64]
    keys: NDArray[np.uint64]
    numbers: NDArray[np.int64]
    clients: NDArray[np.int32]
    names: list[str]
    texts: list[float]
    extra: NDArray[np.bool_]
    ids: NDArray[np.int32]
    pieces: Pieces
    spreads: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def marks(self) -> Marks:
        """What shows whether the texts are near to others."""
        return Marks(self.pieces, self.states[:, 0], self.spreads)

    @property
    def client_hashes(self) -> NDArray[np.uint64]:
        """The fitted.client_hash of each text's client, (n,)."""
        return np.array([client_hash(name) for name in self.names], np.uint64)[self.clients]

    def part(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> "Records":
        """The records at these rows."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _SHAPES})

    def check(self, base: str, num_layers: int, hidden: int, labels: int, ids: int = 0) -> None:
        """Raise ValueError unless these are records of a model with this base and these sizes."""
        if self.base != base:
            raise ValueError("they belong to another model")
        shapes = self.states.shape[1:], self.logits.shape[1:], self.ids.shape[1:]
        if shapes != ((num_layers, hidden), (labels,), (ids,)):
            raise ValueError("their shapes are not those of the model")

    def tokens(self, row: int) -> Tokens:
        """The tokens of a text of a token classifier; the offsets of the n-th are n and n + 1."""
        packed = self.ids[row][self.ids[row] >= 0]
        is_special, is_subword = (packed & SPECIAL).astype(np.bool_), (packed & SUBWORD).astype(np.bool_)
        places = np.arange(len(packed), dtype=np.int32)
        layout = Layout(np.stack([places, places + 1], 1), is_special, is_subword)
        ids = (packed & ~(SPECIAL | SUBWORD)).astype(np.int64)[None]
        return Tokens(ids, np.zeros_like(ids), False, layout)

    def write(self, path: Path) -> None:
        """Write the records atomically to a file that only its owner can read; raises OSError."""
        clients = json.dumps([self.names, self.texts])
        metadata = {"format": FORMAT, "base": self.base, "clients": clients}
        arrays = {name: array for name in _SHAPES if 0 not in (array := getattr(self, name)).shape[1:]}
        content = save({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata)
        write_private_file(path, content)


# By tensor: number of dimensions, and type.
_SHAPES = {
    "states": (3, "F16"),
    "logits": (2, "F32"),
    "shares": (1, "F64"),
    "keys": (1, "U64"),
    "numbers": (1, "I64"),
    "clients": (1, "I32"),
    "extra": (1, "BOOL"),
    "ids": (2, "I32"),
    "pieces": (2, "U32"),
    "spreads": (1, "F32"),
}
_OPTIONAL = ("extra",)  # missing in files of earlier releases
# A file has the logits of texts or, for a token classifier, their tokens.
_OF_TEXTS, _OF_TOKENS = ("logits",), ("ids",)


def packed(tokens: Tokens) -> NDArray[np.int32] | None:
    """A text's tokens for a record, with flags for special tokens and subwords; None if there are too many.

    The text is a single one, with the token type 0.
    """
    layout = tokens.layout
    if layout is None or len(tokens) > MOST_TOKENS or tokens.ids.max() >= SUBWORD:
        return None
    flags = SPECIAL * layout.is_special + SUBWORD * layout.is_subword
    return np.asarray(tokens.ids[0] | flags, np.int32)


def shape_of(manifest: Manifest) -> tuple[int, int, int, int]:
    """The sizes of a model's records: layers, hidden, K and tokens, as Records.check takes them."""
    if manifest.is_spans:
        return 1, manifest.hidden_size, 0, MOST_TOKENS
    return manifest.num_states, manifest.hidden_size, len(manifest.labels), 0


def read(path: Path, max_bytes: int) -> Records:
    """Read and check a file of records; raises OSError, and ValueError for a damaged, oversized or other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is not a records file of this release")
            _check_header(file)
            arrays = {name: file.get_tensor(name) for name in _SHAPES if name in file.keys()}  # noqa: SIM118
            n = len(arrays["keys"])
            arrays.setdefault("extra", np.zeros(n, np.bool_))
            arrays.setdefault("logits", np.zeros((n, 0), np.float32))
            arrays.setdefault("ids", np.zeros((n, 0), np.int32))
    except SafetensorError as error:
        raise ValueError(f"it is damaged: {error}") from None
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    names, texts = _clients(metadata.get("clients", ""))
    clients, shares, numbers = arrays["clients"], arrays["shares"], arrays["numbers"]
    if clients.min() < 0 or clients.max() >= len(names):
        raise ValueError("a record's client is not among the names")
    if shares.min() <= 0 or shares.max() > 1:
        raise ValueError("a share must be above 0 and at most 1")
    if (np.diff(numbers) < 0).any() or numbers[0] < 0 or numbers[-1] > MAX_NUMBER:
        raise ValueError("the records are not in order")
    return Records(str(metadata.get("base", "")), **arrays, names=names, texts=texts)


def _check_header(file: Any) -> None:
    """Raise ValueError for wrong types and shapes, before any tensor is read."""
    has_ids = "ids" in file.keys()  # noqa: SIM118
    absent = {*(_OF_TEXTS if has_ids else _OF_TOKENS), *(one for one in _OPTIONAL if one not in file.keys())}  # noqa: SIM118
    known = [name for name in _SHAPES if name not in absent]
    if missing := [name for name in known if name not in file.keys()]:  # noqa: SIM118
        raise ValueError(f"it has no {missing[0]}; a server of an earlier release may have written it")
    if has_ids and absent & {*file.keys()}:
        raise ValueError("it has tensors of both kinds of models")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in known}
    n = shapes["keys"][0] if shapes["keys"] else 0
    if not 1 <= n <= MAX_RECORDS:
        raise ValueError(f"it has {n} records; it must have 1 to {MAX_RECORDS}")
    for name in known:
        dimensions, kind = _SHAPES[name]
        shape, found = shapes[name], file.get_slice(name).get_dtype()
        is_wrong = name == "pieces" and shape[1:] != (MOST_PIECES,)
        if is_wrong or found != kind or len(shape) != dimensions or shape[0] != n or 0 in shape:
            raise ValueError(f"{name} must be {kind} of {n} records, got {found} {list(shape)}")


def _clients(text: str) -> tuple[list[str], list[float]]:
    """The names of the clients and the number of texts of each; raises ValueError if they are damaged."""
    try:
        names, texts = json.loads(text) if len(text) <= MAX_METADATA else ([], [])
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        texts = [float(number) for number in texts]
    except (ValueError, TypeError, RecursionError):
        raise ValueError("its client names are damaged") from None
    if not are_names or not len(names) == len(texts) <= MAX_CLIENTS or not all(0 <= t < 1e300 for t in texts):
        raise ValueError("its client names are damaged")
    return names, texts


def joined(parts: Sequence[Records]) -> Records:
    """The records of several servers of one model, merged; raises ValueError if their models or shapes differ."""
    first = parts[0]
    if len(parts) == 1:
        return first
    names = [name for part in parts for name in part.names]
    offsets = np.cumsum([0, *(len(part.names) for part in parts)])[:-1]
    num_layers, hidden = first.states.shape[1:]
    for part in parts[1:]:
        part.check(first.base, num_layers, hidden, first.logits.shape[1], first.ids.shape[1])
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _SHAPES}
    arrays["clients"] = np.concatenate(
        [part.clients + np.int32(offset) for part, offset in zip(parts, offsets, strict=True)]
    )
    # The servers' records are interleaved by their relative age.
    order = np.argsort(np.concatenate([np.arange(len(part)) / len(part) for part in parts]), kind="stable")
    arrays = {name: array[order] for name, array in arrays.items()}
    arrays["numbers"] = np.arange(len(order), dtype=np.int64)
    texts = [number for part in parts for number in part.texts]
    return Records(first.base, **arrays, names=names, texts=texts)
