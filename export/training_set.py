"""The texts to which exits are fitted: their pooled states after each layer, and the outputs that exits should give."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import Labels, TextKind

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Target:
    """The outputs that exits are fitted to give for n texts: the model's own at full depth, or the texts' labels.

    Attributes:
        logits: the model's logits at full depth, (n, K); None: the outputs are labels.
        kind: what an answer is.
        labels: true for each label of a text, (n, K); None: the outputs are logits.
    """

    logits: Array | None
    kind: TextKind
    labels: NDArray[np.bool_] | None = None

    @property
    def outputs(self) -> NDArray[Any]:
        """The logits or the labels, (n, K)."""
        outputs = self.labels if self.logits is None else self.logits
        assert outputs is not None
        return outputs

    def part(self, rows: NDArray[np.int64]) -> "Target":
        """The target of the texts at these rows."""
        of = {name: x[rows] for name in ("logits", "labels") if (x := getattr(self, name)) is not None}
        return replace(self, **of)

    @property
    def answers(self) -> NDArray[Any]:
        """The answers: classes or values, (n,), or the assigned labels, (n, K) bool."""
        if self.labels is not None:
            return self.labels if isinstance(self.kind, Labels) else self.labels.argmax(-1)
        return self.kind.answers(self.outputs)

    @property
    def probabilities(self) -> Array:
        """The probabilities, (n, K); 0 or 1 for labels."""
        if self.logits is None:
            return self.outputs.astype(np.float32)
        if isinstance(self.kind, Labels):
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
        return len(self.target.outputs)

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
