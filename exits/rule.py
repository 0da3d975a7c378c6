"""The exit rule of DE3-BERT: leave at the first exit whose score is below τ, else at the last layer.

This is its home in Python. Its home in C is `native/rule.c`, which decides for the kernels; both agree to the
last bit (tests/test_native.py).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exits.signals import Signal

# Why a text left where it did.
ExitReason = Literal["threshold", "last_layer", "max_layer", "deadline"]


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a sample leaves; checks itself.

    Attributes:
        tau: τ in [0, 1]; leave at score < τ, strictly, so 0 means never early.
        signal: what scores a sample.
        max_layer: leave at the deepest exit that is not deeper than this; None: the last layer.
    """

    tau: float
    signal: Signal
    max_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")

    def exits(self, score: float | None) -> bool:
        """Whether a sample with this score leaves; None, from an exit that cannot tell, never does."""
        return score is not None and score < self.tau


def exit_index(scores: NDArray[np.float64], tau: float) -> NDArray[np.int64]:
    """Where samples leave, (n,): the first exit whose score (n, exits) is below τ, else the last one.

    The last exit's score does not matter, and NaN (an exit that cannot tell) is never below τ.
    """
    sure = scores < tau
    sure[:, -1] = True
    return np.asarray(sure.argmax(axis=1))
