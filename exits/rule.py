"""The decision of DE3-BERT: leave at the first exit whose EDR is below τ, else at the last layer."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from exits import signals

MAX_LAM = 100.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one exit says of one sample.

    Attributes:
        probs: class probabilities, (K,).
        label: the most probable class (ties: lowest index).
        entropy: the local signal, in [0, 1].
        distance_ratio: the global signal, in [0, 1]; None at an exit without prototypes.
        edr: both fused, in [0, 1]; None where λ > 0 and there are no prototypes.
    """

    probs: NDArray[np.float64]
    label: int
    entropy: float
    distance_ratio: float | None
    edr: float | None


def read(logits: ArrayLike, distances: ArrayLike | None, lam: float) -> Reading:
    """Read one exit of one sample: its logits and its distances to the prototypes, both (K,)."""
    probs = signals.softmax(logits)
    entropy = signals.entropy(probs)
    ratio = None if distances is None else float(signals.distance_ratio(logits, distances))
    if lam == 0:
        fused: float | None = float(entropy)
    else:
        fused = None if ratio is None else float(signals.edr(entropy, ratio, lam))
    return Reading(probs, int(np.argmax(logits)), float(entropy), ratio, fused)


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a sample leaves; checks itself.

    Attributes:
        tau: τ in [0, 1]; leave at EDR < τ, strictly, so 0 means never early.
        lam: λ in [0, 100], the weight of the distance ratio against the entropy.
        max_layer: leave at the deepest exit that is not deeper than this; None: the last layer.
    """

    tau: float
    lam: float
    max_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")
        if not 0 <= self.lam <= MAX_LAM:
            raise ValueError(f"lambda must be in [0, {MAX_LAM:g}], got {self.lam}")

    def exits(self, reading: Reading) -> bool:
        """Whether this reading is sure enough."""
        return reading.edr is not None and reading.edr < self.tau


def exit_index(edr: NDArray[np.float64], tau: float) -> NDArray[np.int64]:
    """Where samples leave, (n,): the index of the first exit whose edr (n, exits) is below τ, else the last.

    What the last exit says does not matter, and a NaN (no prototypes) is never below τ.
    """
    sure = edr < tau
    sure[:, -1] = True
    return np.asarray(sure.argmax(axis=1))
