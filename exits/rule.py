"""The exit rule of DE3-BERT: exit at the first layer whose score is below τ, else at the last one.

With a flag, exits are one-sided (`exits.flags`): a sample that would exit with a flagged answer runs to the last layer.

This is the Python implementation. `native/rule.c` is the kernels' implementation in C; the two agree bit for
bit (tests/test_native.py).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from de3.exits.flags import Flag
from de3.exits.kinds import CLASSES, Kind
from de3.exits.reading import Reading
from de3.exits.signals import Signal

# Reason for a text's exit.
ExitReason = Literal["threshold", "last_layer", "max_layer", "deadline", "upstream", "upstream_failed"]


@dataclass(frozen=True, slots=True)
class ExitRule:
    """The exit condition; raises ValueError for a τ outside [0, 1].

    Attributes:
        tau: τ in [0, 1]; exit at score < τ, strictly, so 0 never exits early.
        signal: the signal that scores a sample at each exit.
        max_layer: the deepest allowed layer; a sample exits at the last exit up to it, if not before. None: no limit.
        kind: what an answer is; for labels, with their thresholds, and for spans, with the rule that makes them.
        flag: a sample that would exit with an answer that is flagged runs to the last layer; None: it exits with any.
    """

    tau: float
    signal: Signal
    max_layer: int | None = None
    kind: Kind = CLASSES
    flag: Flag | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")

    def exits(self, score: float | None) -> bool:
        """True if a sample with this score exits, unless `blocks` is true; never for None (no score)."""
        return score is not None and score < self.tau

    def blocks(self, reading: Reading) -> bool:
        """True if a sample that would exit with this reading runs to the last layer."""
        return self.flag is not None and self.flag.blocks(reading)


def exit_index(scores: NDArray[np.float64], tau: float) -> NDArray[np.int64]:
    """The index of each sample's exit, (n,): the first with a score below τ, else the last.

    scores: (n, exits). The last exit's score is not used. NaN (no score at this exit) is never below τ.
    """
    below = scores < tau
    below[:, -1] = True
    return np.asarray(below.argmax(axis=1))
