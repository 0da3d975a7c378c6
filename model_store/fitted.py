"""The texts that a model's exits were fitted to, as sets of word pieces.

Exits are right more often about texts that they were fitted to, and about copies of these with a word more or less,
than about new ones. So such texts do not count as evidence.
"""

import numpy as np
from numpy.typing import NDArray

from de3.model_store.segments import Tokens

MOST_PIECES = 128  # of a text; of longer ones, those with the smallest hashes
NO_PIECE = 2**16 - 1  # fills the row of a text with fewer pieces
NEAR = 0.7  # share of the distinct word pieces of two texts that they have in common

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

    def is_near(self, pieces: Pieces) -> bool:
        """True if a text that shares at least NEAR of their pieces with this one was among those of the fit.

        True also if the text has no pieces: those of a record of an earlier release are unknown.
        """
        own = pieces[pieces != NO_PIECE].astype(np.int64)
        if not len(own):
            return True
        parts = [self._texts[self._starts[piece] : self._starts[piece + 1]] for piece in own]
        shared = np.bincount(np.concatenate(parts), minlength=len(self.pieces))
        return bool((shared >= NEAR * (self._sizes + len(own) - shared)).any())

    def are_near(self, pieces: Pieces) -> NDArray[np.bool_]:
        """is_near for texts, (n, MOST_PIECES)."""
        return np.array([self.is_near(one) for one in pieces], np.bool_)
