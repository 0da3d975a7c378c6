"""The texts that a model's exits were fitted to, as sets of word pieces.

Exits are right more often about texts that they were fitted to, and about copies of these with a word more or less,
than about new ones. So such texts do not count as evidence.
"""

import numpy as np
from numpy.typing import NDArray

from de3.model_store.segments import Tokens

MOST_PIECES = 256  # of a text; of longer ones, those with the smallest hashes
NO_PIECE = 2**16 - 1  # fills the row of a text with fewer pieces
# Two texts are near if they have this share of all their distinct word pieces in common; or if the longer one, at most
# twice as long, has this share of the other's pieces.
NEAR, CONTAINED = 0.7, 0.9
MOST_COMPARED = (
    2**18
)  # occurrences of a text's pieces that are counted, from the rarest on; the rest count as shared

Pieces = NDArray[np.uint16]


def pieces_of(tokens: Tokens) -> Pieces:
    """The hashes of a text's distinct word pieces, ascending, then NO_PIECE, (MOST_PIECES,).

    The tokens that begin and end every text are left out.
    """
    ids = tokens.ids[0]
    ids = ids[(ids != ids[0]) & (ids != ids[-1])].astype(np.uint32)
    found = np.unique(((ids * np.uint32(2654435761)) >> np.uint32(16)).astype(np.uint16))[:MOST_PIECES]
    pieces = np.full(MOST_PIECES, NO_PIECE, np.uint16)
    pieces[: len(found)] = found
    return pieces


class FittedTexts:
    """The texts that exits were fitted to.

    Attributes:
        pieces: the word pieces of each text, see pieces_of, (n, MOST_PIECES).
    """

    def __init__(self, pieces: Pieces) -> None:
        """Raises ValueError for an array of another shape or type."""
        if pieces.dtype != np.uint16 or pieces.ndim != 2 or pieces.shape[1] != MOST_PIECES:
            raise ValueError(f"pieces must be uint16 (n, {MOST_PIECES}), got {pieces.dtype} {pieces.shape}")
        self.pieces = pieces
        texts, places = np.nonzero(pieces != NO_PIECE)
        each = pieces[texts, places]
        self._sizes = np.bincount(texts, minlength=len(pieces))
        self._texts = texts[np.argsort(each, kind="stable")]  # by piece
        counts = np.bincount(each, minlength=NO_PIECE)
        self._starts = np.concatenate([[0], counts.cumsum()])  # of each piece's part of self._texts
        # The largest hash of a text that is known to have all smaller ones.
        self._known = np.where(self._sizes < MOST_PIECES, NO_PIECE, pieces[:, -1])

    def is_near(self, pieces: Pieces) -> bool:
        """True if a text that is near to this one was among those of the fit; also for a text without pieces."""
        own = pieces[pieces != NO_PIECE].astype(np.int64)
        if not len(own):
            return True
        counts = self._starts[own + 1] - self._starts[own]
        order = np.argsort(counts)
        counted = own[order[: np.searchsorted(counts[order].cumsum(), MOST_COMPARED, "right")]]
        parts = [self._texts[self._starts[piece] : self._starts[piece + 1]] for piece in counted]
        found = np.bincount(np.concatenate([*parts, own[:0]]), minlength=len(self.pieces))
        shared = found + len(own) - len(counted)
        # Of long texts, the hashes up to the smaller of their largest ones are a sample of the pieces of both.
        mine, theirs = np.searchsorted(own, self._known, "right"), self._sizes.copy()
        if len(own) == MOST_PIECES:
            rows = np.flatnonzero(shared >= CONTAINED / 2 * mine)
            theirs[rows] = (self.pieces[rows] <= own[-1]).sum(1)
        is_near = shared >= NEAR * (theirs + mine - shared)
        shorter = np.minimum(theirs, mine)
        is_near |= (shared >= CONTAINED * shorter) & (np.maximum(theirs, mine) <= 2 * shorter)
        return bool((is_near & (theirs > 0)).any())

    def are_near(self, pieces: Pieces) -> NDArray[np.bool_]:
        """is_near for texts, (n, MOST_PIECES)."""
        return np.array([self.is_near(one) for one in pieces], np.bool_)
