"""The texts that a model's exits were fitted to, as their word pieces and the means of their embeddings.

Exits are right more often about texts that they were fitted to, and about copies of these with a word more or less,
than about new ones. So such texts do not count as evidence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from de3.model_store.segments import Array, Pooling, Tokens

MAX_FITTED = 20_000  # texts of a learned version
MOST_PIECES = 256  # distinct ones of a text; of longer texts, those with the smallest hashes
MOST_COUNT = 2**16 - 1
NO_PIECE = 2**32 - 1  # fills the row of a text with fewer pieces
# Two texts are near if they have this share of all their distinct word pieces in common; or if one has CONTAINED of the
# other's, and these make up HALF of its words, as in a text that is repeated among others.
NEAR, CONTAINED, HALF = 0.7, 0.9, 0.45
# Limit on the work for a text: occurrences of its pieces in fitted texts. A text with more counts as near, so the limit
# can only cost evidence; with MAX_FITTED texts, it takes more than 100 pieces that each of them has.
MOST_COMPARED = 2**21
# Texts of other clients can also be near by their meaning, as if words were replaced by similar ones. A fitted text
# counts 1 if the squared distance between the means of their embeddings is at most CLOSE of the spread, 0 from FAR on,
# and linearly between; together they must count 1. A client's own texts are compared by their pieces only: those made
# from a template are as close as that to each other, and so will its next ones be (lab/docs/copies.md).
CLOSE, FAR = 0.2, 0.5
MAIN = 64  # axes along which most texts that are not similar are told apart

Pieces = NDArray[np.uint32]


def pieces_of(tokens: Tokens) -> Pieces:
    """A text's distinct word pieces, (MOST_PIECES,): 2¹⁶ · hash + number of occurrences, ascending, then NO_PIECE.

    The tokens that begin and end every text are left out.
    """
    ids = tokens.ids[0]
    ids = ids[(ids != ids[0]) & (ids != ids[-1])].astype(np.uint32)
    hashes = np.minimum((ids * np.uint32(2654435761)) >> np.uint32(16), np.uint32(2**16 - 2))
    found, counts = np.unique(hashes, return_counts=True)
    pieces = np.full(MOST_PIECES, NO_PIECE, np.uint32)
    number = min(len(found), MOST_PIECES)
    pieces[:number] = (found << np.uint32(16) | np.minimum(counts, MOST_COUNT).astype(np.uint32))[:number]
    return pieces


@dataclass(frozen=True, slots=True)
class Marks:
    """What shows whether texts are near to others, of n texts or, without the dimension n, of one.

    Attributes:
        pieces: word pieces, see pieces_of, (n, MOST_PIECES).
        means: mean over the tokens of the embeddings' hidden states, as the exits pool them, (n, hidden).
        spreads: variance of the tokens' hidden states about this mean, divided by their number: the squared distance
            that the mean would have from that of other tokens like these, (n,).
    """

    pieces: Pieces
    means: NDArray[np.float16]
    spreads: Array


def mark_of(tokens: Tokens, embeddings: Array, pooling: Pooling) -> Marks:
    """The marks of one text. embeddings: its hidden states after layer 0, (1, tokens, hidden)."""
    rows = pooling.normalized(embeddings)
    mean = pooling.mean(embeddings)
    spread = np.square(rows - mean).sum(dtype=np.float32) / np.float32(len(rows) ** 2)
    with np.errstate(over="ignore"):
        return Marks(pieces_of(tokens), mean.astype(np.float16), spread)


def client_hash(name: str) -> int:
    """A hash of a client's name, uint64."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


class FittedTexts:
    """The texts that exits were fitted to.

    Attributes:
        pieces: the word pieces of each text, see pieces_of, (n, those of the longest).
        means: see Marks, (n, hidden); of versions of earlier releases, of no texts: (0, hidden).
        clients: the client_hash of the client that sent each text in `means`, uint64.
    """

    def __init__(self, pieces: Pieces, means: NDArray[np.float16], clients: NDArray[np.uint64]) -> None:
        """Raises ValueError for an array of another shape or type, or with values that are not finite."""
        if pieces.dtype != np.uint32 or pieces.ndim != 2 or not 0 < pieces.shape[1] <= MOST_PIECES:
            raise ValueError(
                f"pieces must be uint32 (n, 1 to {MOST_PIECES}), got {pieces.dtype} {pieces.shape}"
            )
        if means.dtype != np.float16 or means.ndim != 2 or len(means) not in (0, len(pieces)):
            raise ValueError(
                f"means must be float16 ({len(pieces)}, hidden), got {means.dtype} {means.shape}"
            )
        if clients.dtype != np.uint64 or clients.shape != means.shape[:1]:
            raise ValueError(f"clients must be uint64 ({len(means)},), got {clients.dtype} {clients.shape}")
        if not np.isfinite(means).all():
            raise ValueError("means has values that are not finite")
        self.means, self.clients = np.ascontiguousarray(means), np.ascontiguousarray(clients)
        self._rows, self._senders = means.astype(np.float32), {*clients.tolist()}
        self._axes = _main_axes(self._rows)
        self._main = self._rows @ self._axes
        self._squares = np.square(self._main).sum(1)
        most = max(1, int((pieces != NO_PIECE).sum(1).max(initial=0)))
        self.pieces = pieces = np.ascontiguousarray(pieces[:, :most])
        texts, places = np.nonzero(pieces != NO_PIECE)
        each = pieces[texts, places]
        hashes, counts = each >> 16, each & MOST_COUNT
        self._words = np.bincount(texts, counts, len(pieces))
        self._sizes = np.bincount(texts, minlength=len(pieces))
        order = np.argsort(hashes, kind="stable")
        # The texts that have a piece, and how often, by piece; `_starts` has the beginning of each piece's part.
        self._texts, self._counts = texts[order].astype(np.int32), counts[order].astype(np.uint16)
        self._starts = np.concatenate([[0], np.bincount(hashes, minlength=2**16).cumsum()])
        # The largest hash of a text that is known to have all smaller ones.
        self._known = np.where(self._sizes < MOST_PIECES, MOST_COUNT, pieces[:, -1] >> 16)

    def is_near(self, text: Marks, client: int | None) -> bool:
        """True if a text that is near to this one was among those of the fit.

        client: client_hash of the client that sent it; None: all clients are the same. Also true for a text without
        pieces, and for one that takes too much work to compare. Further fitted texts never make a near text count as
        new: others choose them.
        """
        return self._has_pieces_of(text.pieces) or (client is not None and self._has_similar(text, client))

    def _has_similar(self, text: Marks, client: int) -> bool:
        """True if other clients' fitted texts have nearly the same mean."""
        if self._senders <= {client}:
            return False
        mean, spread = text.means.astype(np.float32), float(text.spreads)
        if not np.isfinite(mean).all():  # it has values that float16 cannot hold
            return True
        # Along some orthonormal axes, distances are at most as large.
        main = mean @ self._axes
        squares = self._squares + main @ main - 2 * (self._main @ main)
        rows = np.flatnonzero((squares < FAR * spread) & (self.clients != client))
        squares = np.square(self._rows[rows] - mean).sum(1)
        counts = (FAR * spread - squares) / ((FAR - CLOSE) * max(spread, 1e-9))
        return bool(np.clip(counts, 0, 1).sum() >= 1)

    def _has_pieces_of(self, pieces: Pieces) -> bool:
        """True if a fitted text has most of the same word pieces."""
        found = pieces[pieces != NO_PIECE]
        own, counts = (found >> 16).astype(np.int64), (found & MOST_COUNT).astype(np.float64)
        parts = [slice(*self._starts[piece : piece + 2]) for piece in own.tolist()]
        lengths = self._starts[own + 1] - self._starts[own]
        if not len(own) or lengths.sum() > MOST_COMPARED:
            return True
        texts = np.concatenate([self._texts[part] for part in parts])
        times = np.concatenate([self._counts[part] for part in parts])
        # For each fitted text: the pieces in common, and how many words of this and of that text they make up. One sum
        # of exact numbers takes a third of the time of two.
        both = np.bincount(texts, np.repeat(2.0**24 + counts, lengths), len(self._sizes)).astype(np.int64)
        shared, words = both >> 24, both & (2**24 - 1)
        their_words = np.bincount(texts, times, len(self._sizes))
        # Of long texts, the hashes up to the smaller of their largest ones are a sample of the pieces of both.
        mine = np.searchsorted(own, self._known, "right")
        all_mine = np.append(0, counts.cumsum())[mine]
        theirs, all_theirs = self._sizes.copy(), self._words.copy()
        if len(own) == MOST_PIECES:
            rows = np.flatnonzero(
                (shared >= NEAR * mine) | (words >= HALF * all_mine)
            )  # others cannot be near
            is_in = self.pieces[rows] >> 16 <= own[-1]
            theirs[rows], all_theirs[rows] = (
                is_in.sum(1),
                (self.pieces[rows] & MOST_COUNT).sum(1, where=is_in),
            )
        is_near = shared >= NEAR * (theirs + mine - shared)
        is_near |= (shared >= CONTAINED * theirs) & (words >= HALF * all_mine)
        is_near |= (shared >= CONTAINED * mine) & (their_words >= HALF * all_theirs)
        return bool((is_near & (shared > 0)).any())

    def are_near(self, texts: Marks, clients: NDArray[np.uint64] | None) -> NDArray[np.bool_]:
        """is_near for n texts, (n,). clients: of each, (n,); None: all are the same."""
        names: Sequence[int | None] = [None] * len(texts.pieces) if clients is None else clients.tolist()
        each = zip(texts.pieces, texts.means, texts.spreads, strict=True)
        return np.array(
            [self.is_near(Marks(*one), name) for one, name in zip(each, names, strict=True)], np.bool_
        )


def _main_axes(rows: Array) -> Array:
    """Orthonormal axes along which rows (n, hidden) vary most: (hidden, at most MAIN)."""
    if len(rows) < 2:
        return np.zeros((rows.shape[1], 0), np.float32)
    centred = rows - rows.mean(0)
    return np.asarray(np.linalg.eigh(centred.T @ centred)[1][:, -MAIN:], np.float32)
