"""Tokenization of texts, truncated to the model's window or split into several windows, in short preemptible steps."""

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from de3.exits.spans import Layout
from de3.exits.windows import Span, capacity, spans
from de3.model_store.segments import Tokens
from de3.model_store.special_tokens import encode_as_characters
from de3.model_store.store import Artifact, StoreError
from de3.model_store.tokenizer_check import TokenizerError, check_tokenizer

MAX_CHARS_PER_TOKEN = 100
# Characters per token of all windows together. The limit is low because an unbroken run of letters is one piece, and
# tokenizing a piece cannot be preempted.
MAX_CHARS_IN_WINDOWS = 10
# A long text is tokenized in pieces of PIECE to 2 · PIECE characters. WordPiece's worst case (words of 100 letters,
# tokenized letter by letter) takes 3 µs per character on an idle machine.
PIECE = 512
# White space at which a text may be split. Other control characters that Python counts as white space are excluded:
# BERT deletes them.
_SPACE = re.compile(r"(?<=\S)[ \t\n\r\u3000]")
IDEOGRAPHS = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
_PROBE = "a"
# Each engine thread tokenizes one text at a time; the tokenizer's own thread pool would compete with these threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Pair = tuple[str, str | None]
Offsets = list[tuple[int, int]]
# Largest share of a window for the shorter text of a pair, which is repeated whole in each window.
MAX_SHORTER = 0.5


def max_chars(max_tokens: int, windows: int = 1) -> int:
    """Maximum number of characters of a text that are read, for `windows` windows of max_tokens."""
    return max_tokens * max(MAX_CHARS_PER_TOKEN, MAX_CHARS_IN_WINDOWS * windows)


class _Frame:
    """The special tokens around a text or a pair, taken from the encoding of a short example."""

    def __init__(self, tokenizer: Tokenizer, pair: str | None) -> None:
        """Raises ValueError if the tokenizer puts special tokens inside a text."""
        encoding = tokenizer.encode(_PROBE, pair)
        owners = encoding.sequence_ids
        positions = [[i for i, o in enumerate(owners) if o == n] for n in range(1 if pair is None else 2)]
        self._special: list[tuple[list[int], list[int]]] = []  # ids and type ids before, between and after
        self._types: list[int] = []  # type id of each text
        end = 0
        for own in positions:
            if not own or own != list(range(own[0], own[-1] + 1)):
                raise ValueError("puts special tokens inside a text")
            self._special.append((encoding.ids[end : own[0]], encoding.type_ids[end : own[0]]))
            self._types.append(encoding.type_ids[own[0]])
            end = own[-1] + 1
        self._special.append((encoding.ids[end:], encoding.type_ids[end:]))
        self.size = sum(len(ids) for ids, _ in self._special)
        self.largest_id = max((i for ids, _ in self._special for i in ids), default=0)
        self.largest_type = max(encoding.type_ids)

    @property
    def before(self) -> list[int]:
        """Ids of the special tokens before the first text."""
        return self._special[0][0]

    def around(self, parts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        """Ids and type ids of the encoder's input: the texts' ids, with the special tokens around them."""
        ids, types = map(list, self._special[0])
        for part, type_id, (special, special_types) in zip(
            parts, self._types, self._special[1:], strict=True
        ):
            ids += [*part, *special]
            types += [*([type_id] * len(part)), *special_types]
        return ids, types

    def layout(self, offsets: NDArray[np.int32], is_subword: NDArray[np.bool_]) -> Layout:
        """The layout of a text, (T, 2) and (T,), with the special tokens around it."""
        count, start = self.size + len(offsets), len(self.before)
        own = slice(start, start + len(offsets))
        # np.pad takes ten times as long: of a short text, a seventh of the time to tokenize it.
        layout = Layout(np.zeros((count, 2), np.int32), np.ones(count, np.bool_), np.zeros(count, np.bool_))
        layout.offsets[own], layout.is_special[own], layout.is_subword[own] = offsets, False, is_subword
        return layout


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text or pair that is too long for one window. Each window of a pair has the whole shorter text.

    Attributes:
        parts: ids of each text, int32.
        longer: index of the text that is split.
        spans: windows of that text.
        offsets: start and end (exclusive) of each of that text's tokens, in characters, (tokens, 2).
        truncated: true if the windows do not contain the whole text.
        is_subword: see Layout, (tokens,); None if no layouts are needed.
    """

    frame: _Frame
    parts: Sequence[NDArray[np.int32]]
    longer: int
    spans: Sequence[Span]
    offsets: NDArray[np.int32]
    truncated: bool
    is_subword: NDArray[np.bool_] | None = None

    def chars(self, index: int) -> tuple[int, int]:
        """The characters [start, end) of the longer text in a window."""
        span = self.spans[index]
        return int(self.offsets[span.start, 0]), int(self.offsets[span.end - 1, 1])

    @property
    def end(self) -> int | None:
        """See Tokens."""
        return self.chars(-1)[1] if self.truncated and len(self.parts) == 1 else None

    @property
    def whole(self) -> Tokens:
        """The tokens of all windows, without a layout."""
        return _tokens(*self.frame.around([part.tolist() for part in self.parts]), self.truncated)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Tokens:
        span = self.spans[index]
        parts = [
            (part[span.start : span.end] if n == self.longer else part).tolist()
            for n, part in enumerate(self.parts)
        ]
        tokens = _tokens(*self.frame.around(parts), self.truncated)
        if self.is_subword is None:
            return tokens
        part = slice(span.start, span.end)
        return replace(tokens, layout=self.frame.layout(self.offsets[part], self.is_subword[part]))


class _Subwords:
    """Finds the tokens of words but the first, as transformers' token-classification pipeline does.

    If the tokenizer marks such tokens (WordPiece), it is one whose name is longer than its characters. Otherwise, it is
    one with no space at its beginning or before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = tokenizer.model
        self._unknown = tokenizer.token_to_id(getattr(model, "unk_token", None) or "")
        if self._unknown is None:
            self._unknown = json.loads(tokenizer.to_str())["model"].get("unk_id")
        self._lengths: NDArray[np.int32] | None = None
        if getattr(model, "continuing_subword_prefix", None):
            vocabulary = tokenizer.get_vocab(with_added_tokens=True)
            self._lengths = np.zeros(max(vocabulary.values()) + 1, np.int32)
            for token, number in vocabulary.items():
                self._lengths[number] = len(token)

    def find(self, ids: NDArray[Any], offsets: NDArray[np.int32], text: str) -> NDArray[np.bool_]:
        """True for the tokens of words but the first, (T,). ids: (T,). offsets: (T, 2)."""
        starts, ends = offsets[:, 0], offsets[:, 1]
        if self._lengths is not None:
            found = self._lengths[ids] != ends - starts
        else:
            is_space = np.array([char == " " for char in text] + [False])
            found = (starts > 0) & ~is_space[starts] & ~is_space[np.maximum(starts - 1, 0)]
        return np.asarray(found & (ids != self._unknown) if self._unknown is not None else found)


class TextTokenizer:
    """Tokenizer of an artifact; a text of more than max_chars() characters counts as too long."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """max_tokens: size of a window.

        Raises ValueError for a tokenizer that joins texts in a way that truncation would break, or whose special tokens
        leave no room for a text.
        """
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._subwords: _Subwords | None = None
        self.frames = {False: _Frame(tokenizer, None), True: _Frame(tokenizer, _PROBE)}
        if self.frames[True].size + 2 > max_tokens:
            raise ValueError(f"{self.frames[True].size} special tokens leave no room in {max_tokens} tokens")
        for pair in (None, "a second text"):
            encoding = tokenizer.encode("a first text", pair)
            if self._join(encoding, pair is not None) != (encoding.ids, encoding.type_ids):
                raise ValueError("joins texts in a way that truncation would break")

    @classmethod
    def of(cls, artifact: Artifact, special_tokens: bool = False) -> "TextTokenizer":
        """Load the tokenizer of an artifact; raises StoreError if it is damaged or cannot be used.

        special_tokens: see Architecture; the default is the artifact's own setting.
        """
        file = artifact.path / "tokenizer.json"
        data = cls.check(artifact)
        try:
            tokenizer = Tokenizer.from_str(data.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception itself; Rust panics are not Exceptions
            raise StoreError(f"{file}: not a tokenizer: {error}") from None
        if tokenizer.padding is not None or tokenizer.truncation is not None:
            raise StoreError(f"{file}: must not pad or truncate; export strips both")
        try:
            if not (special_tokens or artifact.manifest.special_tokens):
                encode_as_characters(tokenizer)
            return cls(tokenizer, artifact.manifest.max_tokens)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as above
            raise StoreError(f"{file}: {error}") from None

    @staticmethod
    def check(artifact: Artifact) -> bytes:
        """Check the artifact's tokenizer.json, and return its bytes; raises StoreError if it must not be loaded."""
        data = artifact.read("tokenizer.json")
        try:
            check_tokenizer(data)
        except TokenizerError as error:
            raise StoreError(f"{artifact.path / 'tokenizer.json'}: {error}") from None
        return data

    def check_ids(self, words: int, types: int | None, pairs: bool) -> None:
        """Raise ValueError if a text could have an id beyond the embedding tables.

        words: rows of the word table. types: rows of the token-type table; None if there are no token types. pairs:
        true if the model takes pairs.
        """
        frames = [self.frames[pair] for pair in (False, True)[: 1 + pairs]]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True).values()
        # The post-processor has ids of its own for special tokens, which need not be in the vocabulary.
        largest = max(*vocabulary, *(frame.largest_id for frame in frames))
        if largest >= words:
            raise ValueError(f"has the id {largest}, but the model's word table has only {words} rows")
        largest = max(frame.largest_type for frame in frames)
        if types is not None and largest >= types:
            raise ValueError(f"has the token type {largest}, but the model's table has only {types} rows")

    def encode(self, texts: Sequence[Pair], special: bool = True, offsets: bool = False) -> list[Encoding]:
        """Encode short texts or pairs. special: add special tokens. offsets: also compute the tokens' offsets.

        Batch encoding, even of one text, releases the GIL, unlike Tokenizer.encode.
        """
        batch = [text if pair is None else (text, pair) for text, pair in texts]
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        return list(encode(batch, add_special_tokens=special))

    def short(self, encoding: Encoding, texts: Pair, truncate: bool, layout: bool = False) -> Tokens:
        """Tokens of a short text or pair from its encoding. layout: true if a layout is needed.

        Raises ValueError if there are no tokens, or if there are too many and `truncate` is false.
        """
        text, pair = texts
        if len(encoding) <= self.max_tokens:
            tokens = _tokens(encoding.ids, encoding.type_ids, False)
        elif not truncate:
            raise self._too_long(f"{len(encoding)}", self.max_tokens)
        else:
            tokens = self._cut(_parts(encoding, pair is not None))
            if pair is None:  # few texts are truncated, and offsets take time
                whole = encoding if layout else self.encode([texts], offsets=True)[0]
                tokens = self._with_end(tokens, _offsets(whole, False)[0])
        if not layout:
            return tokens
        return self._with_layout(tokens, text, encoding.offsets[len(self.frames[False].before) :])

    def _with_end(self, tokens: Tokens, offsets: Offsets) -> Tokens:
        """The tokens of a truncated text, with the end of the last. offsets: of the text's tokens."""
        kept = len(tokens) - self.frames[False].size
        return replace(tokens, end=offsets[kept - 1][1] if kept else 0)

    def start(
        self, text: str, text_pair: str | None, truncate: bool, windows: int = 1, layouts: bool = False
    ) -> "Tokenization":
        """Start tokenizing a text or pair. truncate: cut texts longer than `windows` windows; if false, refuse them.

        layouts: the tokens of the text have a layout; a pair must not need one.
        """
        return Tokenization(self, text, text_pair, truncate, windows, layouts and text_pair is None)

    def _with_layout(self, tokens: Tokens, text: str, offsets: Offsets) -> Tokens:
        """The tokens of a text with their layout. offsets: of the text's tokens, perhaps of some that were cut off."""
        frame = self.frames[False]
        kept = len(tokens) - frame.size
        inside = np.array(offsets[:kept], np.int32).reshape(-1, 2)
        before = len(frame.before)
        is_subword = self._is_subword(tokens.ids[0, before : before + kept], inside, text)
        return replace(tokens, layout=frame.layout(inside, is_subword))

    def _is_subword(self, ids: NDArray[Any], offsets: NDArray[np.int32], text: str) -> NDArray[np.bool_]:
        if self._subwords is None:
            self._subwords = _Subwords(self._tokenizer)
        return self._subwords.find(ids, offsets, text)

    def _join(self, encoding: Encoding, pair: bool) -> tuple[list[int], list[int]]:
        return self.frames[pair].around(_parts(encoding, pair))

    def _cut(self, parts: list[list[int]], is_cut: bool = True, lengths: Sequence[int] = ()) -> Tokens:
        """Tokens of texts with these ids, truncated at the end of the longer one until both fit.

        An odd token goes to the longer text, or to the second if both are equally long. lengths: lengths of the whole
        texts, in any unit, if `parts` has only their first tokens. is_cut: mark the tokens as truncated even if nothing
        is cut off here.
        """
        frame = self.frames[len(parts) == 2]
        room = self.max_tokens - frame.size
        keep = room
        if len(parts) == 2:  # truncate the longer one until both fit
            first, second = lengths or map(len, parts)
            half = room // 2 if first <= second else room - room // 2
            keep = max(room - len(parts[1]), min(len(parts[0]), half))
        kept = [parts[0][:keep], *(part[: room - keep] for part in parts[1:])]
        ids, types = frame.around(kept)
        return _tokens(ids, types, is_cut or sum(map(len, parts)) > room)

    def _split(
        self,
        parts: list[list[int]],
        offsets: Sequence[Offsets],
        most: int,
        is_cut: bool,
        truncate: bool,
        text: str | None = None,
    ) -> Windows:
        """Windows of a text or pair.

        parts: token ids of each text. offsets: start and end of each token in characters, for each text. most: maximum
        number of windows. is_cut: the ids cover only the beginning of a text. text: the text, if layouts are needed.

        Raises ValueError if the shorter text of a pair takes more than MAX_SHORTER of a window, and, unless
        `truncate` is true, if a text does not fit into the windows.
        """
        frame, longer = self.frames[len(parts) == 2], 0
        room = self.max_tokens - frame.size
        if len(parts) == 2:
            longer = int(len(parts[1]) > len(parts[0]))
            shorter, allowed = len(parts[1 - longer]), int(MAX_SHORTER * room)
            if shorter > allowed:
                raise ValueError(
                    f"the shorter text has more than {allowed} tokens, the maximum if the longer is split into "
                    'windows; shorten it, or give "long": "truncate"'
                )
            room -= shorter
        tokens = min(len(parts[longer]), capacity(room, most))
        is_cut = is_cut or tokens < len(parts[longer])
        if is_cut and not truncate:
            raise self._too_long(f"more than {tokens}", tokens)
        arrays = [np.array(part, np.int32) for part in parts]
        found = np.array(offsets[longer], np.int32)
        is_subword = None if text is None else self._is_subword(arrays[longer], found, text)
        return Windows(frame, arrays, longer, spans(tokens, room), found, is_cut, is_subword)

    def _too_long(self, count: str, most: int) -> ValueError:
        return ValueError(f"has {count} tokens; the maximum is {most}: shorten or split it")


class Tokenization:
    """Incremental tokenization of one text or pair, only as far as the request's windows reach."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        text: str,
        text_pair: str | None,
        truncate: bool,
        windows: int,
        layouts: bool = False,
    ) -> None:
        self._tokenizer, self._truncate, self._windows = tokenizer, truncate, windows
        self._layouts = layouts
        texts = [text] if text_pair is None else [text, text_pair]
        self._max_chars = max_chars(tokenizer.max_tokens, windows)
        self._chars = [len(t) for t in texts]
        self._has_too_many_chars = any(chars > self._max_chars for chars in self._chars)
        self._texts = [t[: self._max_chars] for t in texts]
        self._ends = [0] * len(texts)  # characters tokenized so far
        self._parts: list[list[int]] = [[] for _ in texts]
        self._offsets: list[Offsets] = [[] for _ in texts]  # with several windows, or of a single text
        self._room = tokenizer.max_tokens - tokenizer.frames[len(texts) == 2].size
        self._most = capacity(self._room, windows)  # tokens needed of each text

    def step(self) -> Tokens | Windows | None:
        """Tokenize the next piece; returns the tokens or windows once they are complete, and None until then.

        Raises ValueError for a text without tokens, a text that is too long and must not be truncated, and a pair that
        cannot be split.
        """
        tokenizer = self._tokenizer
        if self._has_too_many_chars and not self._truncate:
            raise ValueError(f"has more than {self._max_chars} characters, the maximum: shorten or split it")
        if sum(map(len, self._texts)) <= 2 * PIECE:
            text, *rest = self._texts
            pair = rest[0] if rest else None
            encoding = tokenizer.encode([(text, pair)], offsets=self._layouts)[0]
            if self._windows > 1 and len(encoding) > tokenizer.max_tokens:
                encoding = tokenizer.encode([(text, pair)], offsets=True)[0]
                parts, offsets = _parts(encoding, bool(rest)), _offsets(encoding, bool(rest))
                return tokenizer._split(
                    *(parts, offsets, self._windows, self._has_too_many_chars, self._truncate, self._text)
                )
            tokens = tokenizer.short(encoding, (text, pair), self._truncate, self._layouts)
            if self._has_too_many_chars and not tokens.truncated:
                tokens = replace(tokens, truncated=True, end=None if rest else len(text))
            return tokens
        for n, text in enumerate(self._texts):
            if self._ends[n] < len(text) and len(self._parts[n]) <= self._most:
                end = _piece_end(text, self._ends[n])
                has_offsets = self._windows > 1 or len(self._texts) == 1
                piece_text = text[self._ends[n] : end]
                piece = tokenizer.encode([(piece_text, None)], special=False, offsets=has_offsets)[0]
                self._parts[n] += piece.ids
                if has_offsets:
                    before = self._ends[n]
                    self._offsets[n] += [(before + start, before + stop) for start, stop in piece.offsets]
                self._ends[n] = end
                break
        count = sum(map(len, self._parts))
        if not self._truncate and count > self._most:
            most = tokenizer.max_tokens if self._windows == 1 else self._most
            raise tokenizer._too_long(f"more than {most}", most)
        unread = [end < len(text) for end, text in zip(self._ends, self._texts, strict=True)]
        if any(u and len(part) <= self._most for u, part in zip(unread, self._parts, strict=True)):
            return None
        is_cut = any(unread) or self._has_too_many_chars
        if self._windows > 1 and count > self._room:
            return tokenizer._split(
                *(self._parts, self._offsets, self._windows, is_cut, self._truncate, self._text)
            )
        tokens = tokenizer._cut(self._parts, is_cut, self._chars if is_cut else ())
        if tokens.truncated and len(self._texts) == 1:
            tokens = tokenizer._with_end(tokens, self._offsets[0])
        if self._text is None:
            return tokens
        return tokenizer._with_layout(tokens, self._text, self._offsets[0])

    @property
    def _text(self) -> str | None:
        """The text, if its layout is needed."""
        return self._texts[0] if self._layouts else None

    def all(self) -> Tokens | Windows:
        """Take all remaining steps; returns the tokens or windows."""
        while (tokens := self.step()) is None:
            pass
        return tokens


def _piece_end(text: str, start: int) -> int:
    """End of the piece that starts at `start`: a position where a split changes none of WordPiece's tokens.

    The piece ends before the first white space from PIECE to 2 · PIECE characters after `start`. Without white space
    there, it ends after a mark (see `_is_mark`) in this range, preferably one before a letter or digit; failing that,
    before the first mark or space beyond the range, or at the end of the text. WordPiece has a token boundary at each
    of these positions. With other tokenizers, a split anywhere but before white space may change tokens.
    """
    first, last = start + PIECE, start + 2 * PIECE
    if len(text) <= last:
        return len(text)
    if space := _SPACE.search(text, first, last):
        return space.start()
    marks = [i for i in range(first, last) if _is_mark(text[i])]
    if marks:
        return next((i + 1 for i in marks if text[i] != "'" and text[i + 1].isalnum()), marks[0] + 1)
    ends = (i for i in range(last, len(text)) if _is_mark(text[i]) or unicodedata.category(text[i]) == "Zs")
    return next(ends, len(text))


def _is_mark(char: str) -> bool:
    """True for a character that is a token by itself: punctuation, an ASCII symbol or a CJK ideograph."""
    if char.isascii():
        return not char.isalnum() and char.isprintable() and char != " "
    return unicodedata.category(char)[0] == "P" or unicodedata.name(char, "").startswith(IDEOGRAPHS)


def _parts(encoding: Encoding, pair: bool) -> list[list[int]]:
    """Ids of each text of an encoding, without special tokens."""
    owners = encoding.sequence_ids
    return [[i for i, owner in zip(encoding.ids, owners, strict=True) if owner == n] for n in range(1 + pair)]


def _offsets(encoding: Encoding, pair: bool) -> list[Offsets]:
    """Start and end of each token of each text of an encoding, in characters, without special tokens."""
    both = list(zip(encoding.offsets, encoding.sequence_ids, strict=True))
    return [[offsets for offsets, owner in both if owner == n] for n in range(1 + pair)]


def _tokens(ids: Any, types: Any, truncated: bool) -> Tokens:
    if not ids:
        raise ValueError("has no tokens: it contains nothing that the tokenizer keeps")
    return Tokens(np.array([ids], np.int64), np.array([types], np.int64), truncated)
