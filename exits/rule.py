"""The decision of DE3-BERT: leave at the first exit whose EDR is below τ, else at the last layer."""

from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

MAX_LAM = 100.0


@dataclass(slots=True)
class Reading:
    """What one exit says of one sample.

    Attributes:
        probs: class probabilities, K of them.
        label: the most probable class (ties: lowest index).
        entropy: the local signal, in [0, 1].
        distance_ratio: the global signal, in [0, 1]; None at an exit without prototypes.
        edr: both fused, in [0, 1]; None where λ > 0 and there are no prototypes.
        nearest: distance to the nearest prototype, in [0, 2]; None at an exit without prototypes.
    """

    probs: list[float]
    label: int
    entropy: float
    distance_ratio: float | None
    edr: float | None
    nearest: float | None


def read(logits: list[float], distances: list[float] | None, lam: float) -> Reading:
    """Read one exit of one sample: its logits and its distances to the prototypes, K each.

    The formulas of `exits.signals` for one sample in plain Python: a server does this after every layer, and
    NumPy takes 20 times as long for a handful of classes.
    """
    top = max(logits)
    label = logits.index(top)
    weights = [exp(x - top) for x in logits]
    total = 0.0
    for w in weights:  # not sum(), which compensates from Python 3.12 on: the kernels do the same in C
        total += w
    probs = [w / total for w in weights]
    # −Σ p·log p with log p = (x − top) − log total; 0·(−inf) cannot come: logits are finite.
    mean = 0.0
    for p, x in zip(probs, logits, strict=True):
        mean += p * (x - top)
    local = (log(total) - mean) / log(len(logits))
    local = min(max(local, 0.0), 1.0)  # in this order NaN stays NaN, which is below no τ
    if distances is None:
        return Reading(probs, label, local, None, local if lam == 0 else None, None)
    second = 1 - label if len(logits) == 2 else _second(logits, label)
    # Rounding in float32 can leave a cosine distance a hair outside [0, 2].
    r1, r2 = min(max(distances[label], 0.0), 2.0), min(max(distances[second], 0.0), 2.0)
    largest = r1 if r1 > r2 else r2
    ratio = 0.5 * (1.0 + (r1 - r2) / largest) if largest else 0.5
    below, nearest = lam * local + ratio, min(distances)
    if lam == 0:
        return Reading(probs, label, local, ratio, local, nearest)
    # (λ + 1)/(λ/DR + 1/Entropy) with its fractions cleared
    return Reading(probs, label, local, ratio, (lam + 1.0) * local * ratio / below if below else 0.0, nearest)


def _second(logits: list[float], first: int) -> int:
    """The class ranked second (ties: lowest index)."""
    return max((k for k in range(len(logits)) if k != first), key=logits.__getitem__)


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
