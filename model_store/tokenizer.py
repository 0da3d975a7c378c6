"""From text to tokens, at most as many as the model takes, in short steps between which to preempt it."""

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from model_store.segments import Tokens
from model_store.store import Artifact, StoreError
from model_store.tokenizer_check import TokenizerError, check_tokenizer

MAX_CHARS_PER_TOKEN = 100
# A long text is tokenized in pieces of PIECE to 2 · PIECE characters. WordPiece's worst case (words of 100
# letters that fall into single letters) took 3 µs a character on a quiet machine.
PIECE = 512
# White space at which a text may be cut. BERT deletes other control characters that Python takes for white
# space.
_SPACE = re.compile(r"(?<=\S)[ \t\n\r\u3000]")
IDEOGRAPHS = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
_PROBE = "a"
# One text at a time on each engine thread: the tokenizer's own thread pool would only get in their way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Pair = tuple[str, str | None]


class _Frame:
    """The special tokens around a text or a pair, from how the tokenizer joins a short one."""

    def __init__(self, tokenizer: Tokenizer, pair: str | None) -> None:
        """Raises ValueError if special tokens stand elsewhere than before, between and after the texts."""
        encoding = tokenizer.encode(_PROBE, pair)
        parts = [0 if s is None else s + 1 for s in encoding.sequence_ids]
        places = [
            [i for i, part in enumerate(parts) if part == n] for n in (1, 2)[: 1 if pair is None else 2]
        ]
        self._between: list[tuple[list[int], list[int]]] = []  # ids and type ids before, between and after
        self._types: list[int] = []  # of the texts
        at = 0
        for place in places:
            if not place or place != list(range(place[0], place[-1] + 1)):
                raise ValueError("does not keep a text's tokens together")
            self._between.append((encoding.ids[at : place[0]], encoding.type_ids[at : place[0]]))
            self._types.append(encoding.type_ids[place[0]])
            at = place[-1] + 1
        self._between.append((encoding.ids[at:], encoding.type_ids[at:]))
        self.size = sum(len(ids) for ids, _ in self._between)

    def around(self, parts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Ids and type ids of texts with these ids."""
        ids, types = list(self._between[0][0]), list(self._between[0][1])
        for part, kind, (special, kinds) in zip(parts, self._types, self._between[1:], strict=True):
            ids += [*part, *special]
            types += [*([kind] * len(part)), *kinds]
        return ids, types


class TextTokenizer:
    """An artifact's tokenizer.

    A text counts as too long from MAX_CHARS_PER_TOKEN characters for each token that the model takes.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Raises ValueError for a tokenizer whose texts cannot be cut."""
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self.frames = {False: _Frame(tokenizer, None), True: _Frame(tokenizer, _PROBE)}
        if self.frames[True].size + 2 > max_tokens:
            raise ValueError(f"{self.frames[True].size} special tokens leave no room in {max_tokens} tokens")
        for pair in (None, "a second text"):
            encoding = tokenizer.encode("a first text", pair)
            if self._join(encoding, pair is not None) != (encoding.ids, encoding.type_ids):
                raise ValueError("joins texts in a way that does not survive cutting them")

    @classmethod
    def of(cls, artifact: Artifact) -> "TextTokenizer":
        """That of an artifact; raises StoreError."""
        file = artifact.path / "tokenizer.json"
        data = cls.check(artifact)
        try:
            tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # tokenizers raises plain Exception
            raise StoreError(f"{file}: not a tokenizer: {error}") from None
        if tokenizer.padding is not None or tokenizer.truncation is not None:
            raise StoreError(f"{file}: must not pad or truncate; export strips both")
        try:
            return cls(tokenizer, artifact.manifest.max_tokens)
        except ValueError as error:
            raise StoreError(f"{file}: {error}") from None

    @staticmethod
    def check(artifact: Artifact) -> bytes:
        """The file, with nothing in it that may not be run; raises StoreError."""
        data = artifact.read("tokenizer.json")
        try:
            check_tokenizer(data)
        except TokenizerError as error:
            raise StoreError(f"{artifact.path / 'tokenizer.json'}: {error}") from None
        return data

    def encode(self, texts: Sequence[Pair], special: bool = True) -> list[Encoding]:
        """What the tokenizer makes of short texts or pairs, with or without special tokens.

        One call for many, and even for one: unlike Tokenizer.encode it releases the GIL.
        """
        batch = [text if pair is None else (text, pair) for text, pair in texts]
        return list(self._tokenizer.encode_batch_fast(batch, add_special_tokens=special))

    def short(self, encoding: Encoding, pair: bool, truncate: bool) -> Tokens:
        """The tokens of a short text by its encoding; raises ValueError if it is too long and not to be
        cut."""
        if len(encoding) <= self.max_tokens:
            return _tokens(encoding.ids, encoding.type_ids, False)
        if not truncate:
            raise self._too_long(f"{len(encoding)}")
        return self._cut(_parts(encoding, pair))

    def start(self, text: str, text_pair: str | None, truncate: bool) -> "Tokenization":
        """Begin with a text or pair."""
        return Tokenization(self, text, text_pair, truncate)

    def _join(self, encoding: Encoding, pair: bool) -> tuple[list[int], list[int]]:
        return self.frames[pair].around(_parts(encoding, pair))

    def _cut(self, parts: list[list[int]], is_cut: bool = True) -> Tokens:
        """The tokens of texts with these ids, cut at the longer text's end; an odd place goes to the
        first."""
        frame = self.frames[len(parts) == 2]
        room = self.max_tokens - frame.size
        keep = room
        if len(parts) == 2:  # take from the longer until both fit
            keep = max(room - len(parts[1]), min(len(parts[0]), room - room // 2))
        kept = [parts[0][:keep], *(part[: room - keep] for part in parts[1:])]
        ids, types = frame.around(kept)
        return _tokens(ids, types, is_cut or sum(map(len, parts)) > room)

    def _too_long(self, count: str) -> ValueError:
        return ValueError(
            f"has {count} tokens, the model takes at most {self.max_tokens}; let truncate be true"
        )


class Tokenization:
    """The tokenizing of one text or pair, a piece at a time.

    What is beyond the model's window is not tokenized.
    """

    def __init__(self, tokenizer: TextTokenizer, text: str, text_pair: str | None, truncate: bool) -> None:
        self._of, self._truncate = tokenizer, truncate
        texts = [text] if text_pair is None else [text, text_pair]
        most = MAX_CHARS_PER_TOKEN * tokenizer.max_tokens
        self._has_too_many_chars = any(len(t) > most for t in texts)
        self._texts = [t[:most] for t in texts]
        self._at = [0] * len(texts)
        self._parts: list[list[int]] = [[] for _ in texts]
        self._room = tokenizer.max_tokens - tokenizer.frames[len(texts) == 2].size

    def step(self) -> Tokens | None:
        """Tokenize a piece; the tokens once there are enough, or all. Raises ValueError, see
        TextTokenizer."""
        of = self._of
        if self._has_too_many_chars and not self._truncate:
            most = MAX_CHARS_PER_TOKEN * of.max_tokens
            raise ValueError(f"has more than {most} characters, the most allowed; let truncate be true")
        if sum(map(len, self._texts)) <= 2 * PIECE:
            text, *rest = self._texts
            encoding = of.encode([(text, rest[0] if rest else None)])[0]
            tokens = of.short(encoding, bool(rest), self._truncate)
            return replace(tokens, truncated=True) if self._has_too_many_chars else tokens
        for n, text in enumerate(self._texts):
            if self._at[n] < len(text) and len(self._parts[n]) <= self._room:
                end = _piece_end(text, self._at[n])
                piece = of.encode([(text[self._at[n] : end], None)], special=False)[0]
                self._parts[n] += piece.ids
                self._at[n] = end
                break
        if not self._truncate and sum(map(len, self._parts)) > self._room:
            raise of._too_long(f"more than {of.max_tokens}")
        if any(
            at < len(text) and len(part) <= self._room
            for text, at, part in zip(self._texts, self._at, self._parts, strict=True)
        ):
            return None
        unread = any(at < len(text) for text, at in zip(self._texts, self._at, strict=True))
        return of._cut(self._parts, unread or self._has_too_many_chars)

    def all(self) -> Tokens:
        """The tokens, without a pause."""
        while (tokens := self.step()) is None:
            pass
        return tokens


def _piece_end(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: where a cut changes no token.

    That is before white space; else, where 512 characters have none, between punctuation and a letter or
    digit, or beside a CJK ideograph or punctuation; else at the next such place. WordPiece has a token
    boundary at each of these. Other tokenizers may have other tokens beside such a cut, but only in runs that
    are so long.
    """
    first, last = start + PIECE, start + 2 * PIECE
    if len(text) <= last:
        return len(text)
    if found := _SPACE.search(text, first, last):
        return found.start()
    marks = [at for at in range(first, last) if _is_mark(text[at])]
    if marks:
        return next((at + 1 for at in marks if text[at] != "'" and text[at + 1].isalnum()), marks[0] + 1)
    ends = (
        at for at in range(last, len(text)) if _is_mark(text[at]) or unicodedata.category(text[at]) == "Zs"
    )
    return next(ends, len(text))


def _is_mark(char: str) -> bool:
    """Whether a character is a token by itself: punctuation, an ASCII symbol or a CJK ideograph."""
    if char.isascii():
        return not char.isalnum() and char.isprintable() and char != " "
    return unicodedata.category(char)[0] == "P" or unicodedata.name(char, "").startswith(IDEOGRAPHS)


def _parts(encoding: Encoding, pair: bool) -> list[list[int]]:
    """The ids of an encoding's texts, without special tokens."""
    owners = encoding.sequence_ids
    return [[i for i, owner in zip(encoding.ids, owners, strict=True) if owner == n] for n in range(1 + pair)]


def _tokens(ids: Any, types: Any, truncated: bool) -> Tokens:
    if not ids:
        raise ValueError("has no tokens: there is nothing in it that the model reads")
    return Tokens(np.array([ids], np.int64), np.array([types], np.int64), truncated)
