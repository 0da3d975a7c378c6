"""The outputs of every exit for every sample, as evaluation, calibration and tests use them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits import formulas

MIN_TOLERANCE, MAX_TOLERANCE = 1e-3, 1e9  # of a regression model


@dataclass(frozen=True)
class Recorded:
    """All exits of n samples that were run to full depth.

    Attributes:
        exit_layers: the layers of the exits, ascending; the last is M.
        logits: (n, exits, K).
        distances: cosine distances to the prototypes, (n, exits, K); NaN at exits without prototypes.
        labels: true classes, (n,); of a multi-label model which labels are right, (n, K) bool; of a regression model
            the right values, (n,) float64.
        tokens: tokens of each sample, (n,); None: not recorded.
        original: what the model answered before it was changed (to int8), shaped as labels; None: as full depth does.
        thresholds: of a multi-label model, as logits, (K,); None: classes exclude each other.
        tolerance: of a regression model: values that differ by more are unlike. Its logits are the values, K = 1.
    """

    exit_layers: list[int]
    logits: NDArray[np.float32]
    distances: NDArray[np.float32]
    labels: NDArray[Any]
    tokens: NDArray[np.int64] | None = None
    original: NDArray[Any] | None = None
    thresholds: NDArray[np.float64] | None = None
    tolerance: float | None = None

    def rows(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "Recorded":
        """Some of the samples."""
        tokens, original = (x[which] if x is not None else None for x in (self.tokens, self.original))
        arrays = (self.logits[which], self.distances[which], self.labels[which])
        return Recorded(self.exit_layers, *arrays, tokens, original, self.thresholds, self.tolerance)

    @property
    def answers(self) -> NDArray[Any]:
        """What each exit answers: a class or a value, (n, exits), or which labels, (n, exits, K) bool."""
        if self.tolerance is not None:
            return self.logits[..., 0].astype(np.float64)
        if self.thresholds is None:
            return np.asarray(self.logits.argmax(-1))
        return np.asarray(self.logits > self.thresholds)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each exit's answer is correct, (n, exits): in every label, or within the tolerance."""
        return ~self._unlike(self.labels)

    @property
    def differs(self) -> NDArray[np.bool_]:
        """Whether each exit's answer is not that of full depth, or of the original where that is known, (n, exits)."""
        return self._unlike(self.answers[:, -1] if self.original is None else self.original)

    def _unlike(self, wanted: NDArray[Any]) -> NDArray[np.bool_]:
        if self.tolerance is not None:
            return np.asarray(
                ~(np.abs(self.answers - wanted[:, None]) <= self.tolerance)
            )  # NaN is unlike any
        unlike = self.answers != wanted[:, None]
        return np.asarray(unlike if self.thresholds is None else unlike.any(-1))

    @property
    def entropy(self) -> formulas.Floats:
        """The local signal, (n, exits)."""
        if self.thresholds is not None:
            return formulas.label_entropy(self.logits)
        return formulas.entropy(formulas.softmax(self.logits))

    @property
    def distance_ratio(self) -> formulas.Floats:
        """The global signal, (n, exits); NaN at exits without prototypes."""
        return formulas.distance_ratio(self.logits, self.distances)

    @property
    def risk_features(self) -> formulas.Floats:
        """What `exits.signals.Risk` weighs, (n, exits, 5)."""
        if self.tolerance is not None:
            return formulas.value_features(self.answers)
        if self.thresholds is None:
            return formulas.risk_features(self.logits, self.distances)
        gaps = np.abs(self.logits.astype(np.float64) - self.thresholds)
        return formulas.stacked(gaps.min(-1), self.entropy, np.full(self.logits.shape[:2], np.nan))
