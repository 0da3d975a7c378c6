"""The texts that a model's exits were fitted to, as their word pieces and the means of their embeddings.

Exits are right more often about texts that they were fitted to, and about copies of these with a word more or less,
than about new ones. So such texts do not count as evidence.
"""

from dataclasses import dataclass

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
# Two texts are also near if the squared distance between the means of their embeddings is below this share of the
# spread, as in a text whose words were replaced by similar ones. Of new texts, hardly any are so close to a fitted one
# that do not share its word pieces (lab/docs/copies.md).
CLOSE = 0.25

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


class FittedTexts:
    """The texts that exits were fitted to.

    Attributes:
        pieces: the word pieces of each text, see pieces_of, (n, those of the longest).
        means: see Marks, (n, hidden); None of versions of earlier releases, whose texts are compared by their pieces.
    """

    def __init__(self, pieces: Pieces, means: NDArray[np.float16] | None) -> None:
        """Raises ValueError for an array of another shape or type, or with values that are not finite."""
        if pieces.dtype != np.uint32 or pieces.ndim != 2 or not 0 < pieces.shape[1] <= MOST_PIECES:
            raise ValueError(
                f"pieces must be uint32 (n, 1 to {MOST_PIECES}), got {pieces.dtype} {pieces.shape}"
            )
        if means is not None and (means.dtype != np.float16 or means.ndim != 2 or len(means) != len(pieces)):
            raise ValueError(
                f"means must be float16 ({len(pieces)}, hidden), got {means.dtype} {means.shape}"
            )
        if means is not None and not np.isfinite(means).all():
            raise ValueError("means has values that are not finite")
        self.means = None if means is None else np.ascontiguousarray(means)
        self._rows = np.zeros((0, 0), np.float32) if means is None else means.astype(np.float32)
        self._squares = np.square(self._rows).sum(1)
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

    def is_near(self, text: Marks) -> bool:
        """True if a text that is near to this one was among those of the fit.

        Also for a text without pieces, and for one that takes too much work to compare. Each fitted text is compared by
        itself, so further ones never make a near text count as new: others choose them.
        """
        return self._has_close(text) or self._has_pieces_of(text.pieces)

    def _has_close(self, text: Marks) -> bool:
        """True if a fitted text has nearly the same mean."""
        if not len(self._rows):
            return False
        mean = text.means.astype(np.float32)
        distances = self._squares + mean @ mean - 2 * (self._rows @ mean)
        return not distances.min() >= CLOSE * text.spreads  # true, too, for values that float16 cannot hold

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

    def are_near(self, texts: Marks) -> NDArray[np.bool_]:
        """is_near for n texts, (n,)."""
        each = zip(texts.pieces, texts.means, texts.spreads, strict=True)
        return np.array([self.is_near(Marks(*one)) for one in each], np.bool_)
