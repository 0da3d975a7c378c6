"""The outputs of every exit for every sample, as evaluation, calibration and tests use them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exits import formulas


@dataclass(frozen=True)
class Recorded:
    """All exits of n samples that were run to full depth.

    Attributes:
        exit_layers: the layers of the exits, ascending; the last is M.
        logits: (n, exits, K).
        distances: cosine distances to the prototypes, (n, exits, K); NaN at exits without prototypes.
        labels: true classes, (n,).
        tokens: tokens of each sample, (n,); None: not recorded.
        original: what the model answered before it was changed (to int8), (n,); None: as full depth does.
    """

    exit_layers: list[int]
    logits: NDArray[np.float32]
    distances: NDArray[np.float32]
    labels: NDArray[np.int64]
    tokens: NDArray[np.int64] | None = None
    original: NDArray[np.int64] | None = None

    def rows(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Recorded":
        """Some of the samples."""
        tokens, original = (x[which] if x is not None else None for x in (self.tokens, self.original))
        arrays = (self.logits[which], self.distances[which], self.labels[which])
        return Recorded(self.exit_layers, *arrays, tokens, original)

    @property
    def differs(self) -> NDArray[np.bool_]:
        """Whether each exit's label is not that of full depth, or of the original where that is known, (n, exits)."""
        answers = self.logits.argmax(-1)
        wanted = answers[:, -1] if self.original is None else self.original
        return np.asarray(answers != wanted[:, None])

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each exit's label is correct, (n, exits)."""
        return np.asarray(self.logits.argmax(-1) == self.labels[:, None])

    @property
    def entropy(self) -> formulas.Floats:
        """The local signal, (n, exits)."""
        return formulas.entropy(formulas.softmax(self.logits))

    @property
    def distance_ratio(self) -> formulas.Floats:
        """The global signal, (n, exits); NaN at exits without prototypes."""
        return formulas.distance_ratio(self.logits, self.distances)
