"""Check of SentencePiece's character table (precompiled_charsmap), before the tokenizers library traverses it.

The table is a double-array trie over UTF-8 bytes and a string of replacements, each terminated by a zero
byte. The library does not check indices, and an index out of range kills the thread. It also does not limit the length
of a replacement.
"""

import base64
import binascii

import numpy as np
from numpy.typing import NDArray

MAX_BYTES = 2**21
MAX_REPLACEMENT = 36  # bytes that replace one or more characters; NFKC's longest has 33
BYTES = np.arange(1, 256, dtype=np.int64)


def check_charsmap(encoded: str) -> None:
    """Raise ValueError unless every traversal of the base64 table stays inside it and yields a short replacement."""
    if len(encoded) > 4 * MAX_BYTES // 3 + 4:
        raise ValueError(f"the table has more than {MAX_BYTES} bytes")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the table is not base64") from None
    size = int.from_bytes(data[:4], "little")
    if len(data) < 8 or size % 4 or not 4 <= size <= len(data) - 4:
        raise ValueError("the table's trie does not have the stated length")
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    replacements = data[4 + size :]
    try:
        replacements.decode()
    except UnicodeDecodeError:
        raise ValueError("the table's replacements are not UTF-8") from None
    for value in _values(units):
        _check_replacement(replacements, value)


def _values(units: NDArray[np.int64]) -> set[int]:
    """Every value of the trie that is reachable from the root; raises ValueError for an index outside the trie."""
    values: set[int] = set()
    seen, pending = set[int](), [int(_offset(units[0]))]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        places = node ^ BYTES
        if places.max() >= len(units):
            raise ValueError("the table's trie has an index outside it")
        candidates = units[places]
        matches = (candidates & (1 << 31 | 0xFF)) == BYTES
        children = places[matches] ^ _offset(candidates[matches])
        if children.size and children.max() >= len(units):
            raise ValueError("the table's trie has an index outside it")
        leaves = children[(candidates[matches] >> 8 & 1) == 1]
        values.update((units[leaves] & (1 << 31) - 1).tolist())
        pending += children.tolist()
    return values


def _offset(unit: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray((unit >> 10) << ((unit & 1 << 9) >> 6))


def _check_replacement(replacements: bytes, start: int) -> None:
    end = replacements.find(b"\0", start, start + MAX_REPLACEMENT + 1)
    if start >= len(replacements) or end < 0:
        raise ValueError(f"the table has a replacement outside it, or longer than {MAX_REPLACEMENT} bytes")
    if replacements[start] & 0xC0 == 0x80:
        raise ValueError("a replacement in the table begins within a character")
