"""The exit rule of DE3-BERT: exit at the first layer whose score is below τ, else at the last one.

This is the Python implementation. `native/rule.c` is the kernels' implementation in C; the two agree bit for
bit (tests/test_native.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from de3.exits.reading import Reading, read, read_labels, read_tokens, read_value
from de3.exits.signals import Signal
from de3.exits.spans import Layout, SpanRule

# Reason for a text's exit.
ExitReason = Literal["threshold", "last_layer", "max_layer", "deadline", "upstream", "upstream_failed"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The thresholds of a multi-label model: a label is assigned if its logit is above its threshold.

    Attributes:
        logits: the thresholds as logits, (K,).
        table: the same thresholds as float64 bytes, for the kernels.
    """

    logits: tuple[float, ...]
    table: bytes

    @classmethod
    def of(cls, probabilities: Iterable[float]) -> "Thresholds":
        """Thresholds from probabilities, each above 0 and below 1."""
        logits = tuple(log(p / (1.0 - p)) for p in probabilities)
        return cls(logits, np.array(logits, np.float64).tobytes())


def logit_thresholds(probabilities: Iterable[float] | None) -> NDArray[np.float64] | None:
    """The thresholds of a multi-label model as logits, (K,), for Recorded; None for other models."""
    return None if probabilities is None else np.array(Thresholds.of(probabilities).logits)


@dataclass(frozen=True, slots=True)
class ExitRule:
    """The exit condition; raises ValueError for a τ outside [0, 1].

    Attributes:
        tau: τ in [0, 1]; exit at score < τ, strictly, so 0 never exits early.
        signal: the signal that scores a sample at each exit.
        max_layer: the deepest allowed layer; a sample exits at the last exit up to it, if not before. None: no limit.
        thresholds: label thresholds of a multi-label model; None for other models.
        spans: how a token classifier's spans are made; None for other models.
    """

    tau: float
    signal: Signal
    max_layer: int | None = None
    thresholds: Thresholds | None = None
    spans: SpanRule | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ValueError(f"tau must be in [0, 1], got {self.tau}")

    def read(self, layer: int, logits: list[float], distances: list[float] | None) -> Reading:
        """The Reading of one exit, from its K logits and K distances to prototypes; K = 1 for regression.

        distances: None at an exit without prototypes.
        """
        if len(logits) == 1:
            return read_value(layer, logits)
        if self.thresholds is not None:
            return read_labels(layer, logits, self.thresholds.logits)
        return read(layer, logits, distances)

    def read_tokens(self, layer: int, logits: NDArray[np.float32], layout: Layout) -> Reading:
        """The Reading of one exit of a token classifier, from the logits of its tokens, (T, K)."""
        assert self.spans is not None
        return read_tokens(layer, logits, layout, self.spans)

    def exits(self, score: float | None) -> bool:
        """True if a sample with this score exits; never for None (no score at this exit)."""
        return score is not None and score < self.tau


def exit_index(scores: NDArray[np.float64], tau: float) -> NDArray[np.int64]:
    """The index of each sample's exit, (n,): the first with a score below τ, else the last.

    scores: (n, exits). The last exit's score is not used. NaN (no score at this exit) is never below τ.
    """
    below = scores < tau
    below[:, -1] = True
    return np.asarray(below.argmax(axis=1))
