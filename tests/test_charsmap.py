"""SentencePiece's character table: a valid one normalizes, and one that would crash a thread is refused."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers

from de3.model_store.charsmap import MAX_REPLACEMENT, check_charsmap
from de3.model_store.tokenizer_check import TokenizerError, check_tokenizer


def table(
    key: bytes = "\ufb01".encode(), text: bytes = b"fi\0", value: int = 0, end: int = 0, size: int = 0
) -> str:
    """A table, in base64, that replaces `key` with `text`, which ends with a null byte.

    value: offset of the replacement. end: offset in the trie at which the lookup of `key` ends. size: length of the
    trie, in units. For each of them, 0 stands for the valid value.
    """
    units = np.zeros(256 * (len(key) + 2), np.uint32)
    units[0] = 256 << 10
    node = 256
    for i, byte in enumerate(key, 1):
        place, is_last = node ^ byte, i == len(key)
        node = end if is_last and end else 256 * (i + 1)
        units[place] = (place ^ node) << 10 | (1 << 8 if is_last else 0) | byte
    if node < len(units):
        units[node] = value | 1 << 31
    data = units[: size or None].astype("<u4").tobytes()
    return base64.b64encode(len(data).to_bytes(4, "little") + data + text).decode()


def tokenizer(charsmap: Any, count: int = 1) -> bytes:
    """A tokenizer.json that applies this table `count` times, as Precompiled normalizers."""
    plain = json.loads(Tokenizer(models.WordLevel({"[UNK]": 0, "fine": 1}, unk_token="[UNK]")).to_str())
    part = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    plain["normalizer"] = {"type": "Sequence", "normalizers": [part] * count}
    return json.dumps(plain).encode()


def test_a_valid_table_normalizes() -> None:
    data = tokenizer(table())
    check_tokenizer(data)
    opened = Tokenizer.from_str(data.decode())
    assert opened.normalizer.normalize_str("\ufb01ne") == "fine"
    assert opened.encode("\ufb01ne").ids == [1]
    check_charsmap(table(text=b"x" * MAX_REPLACEMENT + b"\0"))


@pytest.mark.parametrize(
    ("charsmap", "message"),
    [
        ("?", "not base64"),
        (base64.b64encode(b"\5\0\0\0" + bytes(5)).decode(), "not have the stated length"),
        (base64.b64encode(b"\4\0\0\0" + bytes(4)).decode(), "index outside it"),
        (table(size=511), "index outside it"),  # the root's children end at 511
        (table(end=1 << 18), "index outside it"),
        (table(value=3), "outside it"),
        (table(text=b"x" * (MAX_REPLACEMENT + 1) + b"\0"), "longer than"),
        (table(text=b"fi"), "outside it"),
        (table(text="é\0".encode(), value=1), "within a character"),
        (table(text=b"\xff\0"), "not UTF-8"),
        ("A" * 3 * 2**20, "more than"),
        (None, "has no precompiled_charsmap"),
    ],
)
def test_an_invalid_table_is_refused(charsmap: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        check_tokenizer(tokenizer(charsmap))


def test_mutated_tables_are_refused_or_harmless() -> None:
    sound = bytearray(base64.b64decode(table()))
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        changed = bytearray(sound)
        # Change one of the nonzero bytes: they are the few trie entries in use, and the replacement.
        used = np.flatnonzero(np.frombuffer(bytes(sound), np.uint8))
        changed[int(rng.choice(used[4:]))] = int(rng.integers(256))
        encoded = base64.b64encode(bytes(changed)).decode()
        try:
            check_charsmap(encoded)
        except ValueError:
            continue
        accepted += 1
        normalizer = normalizers.Precompiled(bytes(changed))
        for text in ("a\ufb01ne", "\u00ef\u00ac\u0081"):
            assert len(normalizer.normalize_str(text)) <= MAX_REPLACEMENT * len(text)
    assert 0 < accepted < 300


def test_a_table_may_not_be_combined_with_another_or_with_components_that_lengthen_a_text() -> None:
    with pytest.raises(TokenizerError, match="more than one Precompiled"):
        check_tokenizer(tokenizer(table(), 2))
    plain = json.loads(tokenizer(table()))
    plain["normalizer"]["normalizers"].append({"type": "Prepend", "prepend": "x"})
    with pytest.raises(TokenizerError, match="may not be combined with components that lengthen a text"):
        check_tokenizer(json.dumps(plain).encode())
