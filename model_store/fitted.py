"""The texts that a model's exits were fitted to, as their word pieces.

Exits are right more often about texts that they were fitted to, and about copies of these with a word more or less,
than about new ones. So such texts do not count as evidence.
"""

import numpy as np
from numpy.typing import NDArray

from de3.model_store.segments import Tokens

MOST_PIECES = 256  # distinct ones of a text; of longer texts, those with the smallest hashes
MOST_COUNT = 2**16 - 1
NO_PIECE = 2**32 - 1  # fills the row of a text with fewer pieces
# Two texts are near if they have this share of all their distinct word pieces in common; or if one has CONTAINED of the
# other's, and these make up HALF of its words, as in a text that is repeated among others.
NEAR, CONTAINED, HALF = 0.7, 0.9, 0.45
# Limits on the work for a text: occurrences of its pieces that are counted, from the rarest on; and fitted texts that
# are then compared with it, those with most of these pieces.
MOST_COMPARED, MOST_ROWS = 2**17, 2**8

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


class FittedTexts:
    """The texts that exits were fitted to.

    Attributes:
        pieces: the word pieces of each text, see pieces_of, (n, those of the longest).
    """

    def __init__(self, pieces: Pieces) -> None:
        """Raises ValueError for an array of another shape or type."""
        if pieces.dtype != np.uint32 or pieces.ndim != 2 or not 0 < pieces.shape[1] <= MOST_PIECES:
            raise ValueError(
                f"pieces must be uint32 (n, 1 to {MOST_PIECES}), got {pieces.dtype} {pieces.shape}"
            )
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

    def is_near(self, pieces: Pieces) -> bool:
        """True if a text that is near to this one was among those of the fit; also for a text without pieces."""
        found = pieces[pieces != NO_PIECE]
        own, counts = (found >> 16).astype(np.int64), (found & MOST_COUNT).astype(np.int64)
        if not len(own):
            return True
        # Of long texts, the hashes up to the smaller of their largest ones are a sample of the pieces of both.
        mine = np.searchsorted(own, self._known, "right")
        all_mine = np.append(0, counts.cumsum())[mine]
        rows = self._candidates(own, counts, mine, all_mine)
        known = self.pieces[rows]
        if len(own) == MOST_PIECES:
            known = np.where(known >> 16 <= own[-1], known, NO_PIECE)
        hashes, times = known >> 16, np.where(known == NO_PIECE, 0, known & MOST_COUNT)
        my_counts = np.zeros(2**16, np.int64)
        my_counts[own] = counts
        mine_in, is_known = my_counts[hashes], known != NO_PIECE
        is_shared = mine_in > 0
        shared, theirs, mine, all_mine = is_shared.sum(1), is_known.sum(1), mine[rows], all_mine[rows]
        is_near = shared >= NEAR * (theirs + mine - shared)
        is_near |= (shared >= CONTAINED * theirs) & (mine_in.sum(1) >= HALF * all_mine)
        is_near |= (shared >= CONTAINED * mine) & ((times * is_shared).sum(1) >= HALF * times.sum(1))
        return bool((is_near & (theirs > 0)).any())

    def _candidates(
        self,
        own: NDArray[np.int64],
        counts: NDArray[np.int64],
        mine: NDArray[np.int64],
        all_mine: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The fitted texts that may be near to a text, at most MOST_ROWS: those with most of its rarer pieces.

        own, counts: the text's pieces, and how often they occur. mine, all_mine: for each fitted text, the number of
        pieces and of words that are comparable with it.
        """
        lengths, n = self._starts[own + 1] - self._starts[own], len(self.pieces)
        order = np.argsort(lengths)
        number = int(np.searchsorted(lengths[order].cumsum(), MOST_COMPARED, "right"))
        counted, common = order[:number], order[number:]
        parts = [np.arange(self._starts[piece], self._starts[piece + 1]) for piece in own[counted]]
        places = np.concatenate([*parts, own[:0]])
        texts = self._texts[places]
        found = np.bincount(texts, minlength=n)
        words = np.bincount(texts, np.repeat(counts[counted], lengths[counted]), n) + counts[common].sum()
        shared = found + len(common)  # at most: pieces that are too common are not counted
        is_half = words >= HALF * all_mine
        if len(own) == MOST_PIECES:  # which of a fitted text's pieces are comparable is not known yet
            may_be = (shared >= NEAR * mine) | is_half
        else:
            their_words = np.bincount(texts, self._counts[places], n)
            may_be = shared >= NEAR * (self._sizes + mine - shared)
            may_be |= (shared >= CONTAINED * self._sizes) & is_half
            may_be |= (shared >= CONTAINED * mine) & ((their_words >= HALF * self._words) | (len(common) > 0))
        rows = np.flatnonzero(may_be)
        return rows[np.argsort(-found[rows], kind="stable")[:MOST_ROWS]]

    def are_near(self, pieces: Pieces) -> NDArray[np.bool_]:
        """is_near for texts, (n, MOST_PIECES)."""
        return np.array([self.is_near(one) for one in pieces], np.bool_)
