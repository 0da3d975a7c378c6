"""The texts to which exits are fitted: their pooled states after each layer, and the outputs that exits reproduce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from de3.exits.recorded import answers_of
from de3.exits.rule import logit_thresholds

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """The outputs that exits are fitted to reproduce, for n texts: the model's own at full depth.

    Attributes:
        logits: (n, K).
        thresholds, tolerance: see exits.recorded.Recorded.
    """

    logits: Array
    thresholds: NDArray[np.float64] | None
    tolerance: float | None

    @classmethod
    def of(cls, logits: Array, thresholds: Sequence[float] | None, tolerance: float | None) -> "Target":
        """The target of logits, (n, K). thresholds: as probabilities."""
        return cls(logits, logit_thresholds(thresholds), tolerance)

    def part(self, rows: NDArray[np.int64]) -> "Target":
        """The target of the texts at these rows."""
        return replace(self, logits=self.logits[rows])

    @property
    def answers(self) -> NDArray[np.generic]:
        """The answers: classes or values, (n,), or the assigned labels, (n, K) bool."""
        return answers_of(self.logits, self.thresholds, self.tolerance)

    @property
    def probabilities(self) -> Array:
        """The probabilities, (n, K)."""
        if self.thresholds is not None:
            return sigmoid(self.logits)
        odds = np.exp(self.logits - self.logits.max(-1, keepdims=True))
        return np.asarray(odds / odds.sum(-1, keepdims=True), np.float32)


@dataclass(frozen=True)
class TrainingSet:
    """n texts to which exits are fitted.

    Attributes:
        target: the outputs that exits reproduce.
        groups: number of each text's group of related texts, (n,).
        states: returns the pooled states of all texts after a layer, (texts, hidden), given the pooling ("mean" or
            "cls") and the layer. They may be read from a file, so that only one layer is in memory.
        rows: indices of the n texts in these states, (n,); None if they are all of them.
    """

    target: Target
    groups: NDArray[np.int64]
    states: Callable[[str, int], NDArray[np.floating]]
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.target.logits)

    def part(self, rows: NDArray[np.int64]) -> "TrainingSet":
        """The texts at these rows."""
        inner = rows if self.rows is None else self.rows[rows]
        return replace(self, target=self.target.part(rows), groups=self.groups[rows], rows=inner)

    def pooled(self, pooling: str, layer: int) -> Array:
        """The pooled states of a layer, (n, hidden)."""
        states = self.states(pooling, layer)
        return (states if self.rows is None else states[self.rows]).astype(np.float32)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(−x)), in a form that never overflows."""
    return np.asarray(0.5 * (1 + np.tanh(logits / 2)), np.float32)
