"""The exit rule of DE3-BERT: exit at the first layer whose score is below τ, else at the last one.

This is the Python implementation. `native/rule.c` is the kernels' implementation in C; the two agree bit for
bit (tests/test_native.py).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exits.signals import Signal

# Why a text exited at its layer.
ExitReason = Literal["threshold", "last_layer", "max_layer", "deadline"]


@dataclass(frozen=True, slots=True)
class ExitRule:
    """When a sample exits; validates itself.

    Attributes:
        tau: τ in [0, 1]; exit at score < τ, strictly, so 0 never exits early.
        signal: scores a sample at an exit.
        max_layer: exit at the latest at the deepest exit not deeper than this; None: at the last layer.
    """

    tau: float
    signal: Signal
    max_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")

    def exits(self, score: float | None) -> bool:
        """Whether a sample with this score exits; None (no score at this exit) never does."""
        return score is not None and score < self.tau


def exit_index(scores: NDArray[np.float64], tau: float) -> NDArray[np.int64]:
    """The index of each sample's exit, (n,): the first whose score (n, exits) is below τ, else the last.

    The last exit's score is not used. NaN (no score at this exit) is never below τ.
    """
    below = scores < tau
    below[:, -1] = True
    return np.asarray(below.argmax(axis=1))
