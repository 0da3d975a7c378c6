"""The four kinds of answers: one of mutually exclusive classes, labels, a value, or spans.

What is pure and differs between them is here: how an exit is read, what differs, and the features of its risk, for one
text and for arrays. To add a kind, write a class here and list it in `Kind`; mypy then finds every `match` that lacks
it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, assert_never

import numpy as np
from numpy.typing import NDArray

from de3.exits import formulas
from de3.exits.formulas import Floats
from de3.exits.reading import (
    Answer,
    ClassReading,
    LabelsReading,
    SpansReading,
    ValueReading,
    read,
    read_labels,
    read_tokens,
)
from de3.exits.spans import Array, Layout, SpanRule


@dataclass(frozen=True, slots=True)
class Classes:
    """One of mutually exclusive classes."""

    why: ClassVar[str] = "its classes are mutually exclusive"
    sees_state: ClassVar[bool] = True  # risk may weigh an exit's state; for other kinds, that was not tried

    def read(self, layer: int, logits: list[float], distances: list[float] | None) -> ClassReading:
        """The reading of an exit, from its logits and its distances to the prototypes, K each.

        distances: None at an exit without prototypes.
        """
        return read(layer, logits, distances)

    def answers(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """The class that logits (..., K) give, (...)."""
        return np.asarray(logits.argmax(-1))

    def differ(self, answers: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
        """True where two arrays of answers, (...), differ, (...)."""
        return np.asarray(answers != expected)

    def entropy(self, logits: NDArray[np.float32]) -> Floats:
        """The local signal of logits (..., K), (...)."""
        return formulas.entropy(formulas.softmax(logits))

    def risk_features(self, logits: NDArray[np.float32], distances: NDArray[np.float32]) -> Floats:
        """The features of `exits.signals.Risk`, (n, exits, 5), of logits and distances, (n, exits, K)."""
        exits = range(logits.shape[1])  # one by one, as all at once take ten times the memory of the logits
        parts = [formulas.risk_features(logits[:, [j]], distances[:, [j]]) for j in exits]
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels whose probability is above their threshold, each on its own.

    Attributes:
        logits: the thresholds as logits, (K,).
        table: the same thresholds as float64 bytes, for the kernels.
    """

    logits: tuple[float, ...]
    table: bytes
    sees_state: ClassVar[bool] = False

    @classmethod
    def of(cls, probabilities: Iterable[float]) -> "Labels":
        """The labels with these thresholds, probabilities above 0 and below 1."""
        logits = tuple(log(p / (1.0 - p)) for p in probabilities)
        return cls(logits, np.array(logits, np.float64).tobytes())

    @property
    def thresholds(self) -> Floats:
        """The thresholds as logits, (K,)."""
        return np.frombuffer(self.table, np.float64)

    def read(self, layer: int, logits: list[float], distances: list[float] | None) -> LabelsReading:
        """The reading of an exit, from its K logits; distances are not used."""
        return read_labels(layer, logits, self.logits)

    def assigned(self, logits: list[float]) -> list[int]:
        """The labels that K logits assign."""
        return [k for k, threshold in enumerate(self.logits) if logits[k] > threshold]

    def answers(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """The labels that logits (..., K) assign, (..., K) bool."""
        return np.asarray(logits > self.thresholds)

    def differ(self, answers: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
        """True where two arrays of answers, (..., K) bool, differ in a label, (...)."""
        return np.asarray((answers != expected).any(-1))

    def entropy(self, logits: NDArray[np.float32]) -> Floats:
        """The local signal of logits (..., K), (...)."""
        return formulas.label_entropy(logits)

    def risk_features(self, logits: NDArray[np.float32], distances: NDArray[np.float32]) -> Floats:
        """The features of `exits.signals.Risk`, (n, exits, 5), of logits (n, exits, K)."""
        gaps = np.abs(logits.astype(np.float64) - self.thresholds)
        return formulas.stacked(gaps.min(-1), self.entropy(logits), np.full(logits.shape[:2], np.nan))


@dataclass(frozen=True, slots=True)
class Value:
    """The value of a regression model, whose only logit it is.

    Attributes:
        tolerance: the largest difference between two values that counts as agreement.
    """

    tolerance: float
    why: ClassVar[str] = "its answer is a number"
    sees_state: ClassVar[bool] = False

    def read(self, layer: int, logits: list[float], distances: list[float] | None) -> ValueReading:
        """The reading of an exit, from its only logit; distances are not used."""
        return ValueReading(layer, logits[0])

    def answers(self, logits: NDArray[np.float32]) -> NDArray[Any]:
        """The values of logits (..., 1), (...)."""
        return logits[..., 0].astype(np.float64)

    def differ(self, answers: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
        """True where two arrays of values, (...), differ by more than the tolerance, (...)."""
        return np.asarray(~(np.abs(answers - expected) <= self.tolerance))  # NaN differs from every value

    def risk_features(self, logits: NDArray[np.float32], distances: NDArray[np.float32]) -> Floats:
        """The features of `exits.signals.Risk`, (n, exits, 5), of logits (n, exits, 1)."""
        return formulas.value_features(self.answers(logits))


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans of a text, from the labels of its tokens.

    Attributes:
        rule: how the spans are made.
    """

    rule: SpanRule
    why: ClassVar[str] = "its answer is the spans of a text"
    sees_state: ClassVar[bool] = False

    def read(self, layer: int, logits: Array, layout: Layout) -> SpansReading:
        """The reading of an exit, from the logits of the text's tokens, (T, K)."""
        return read_tokens(layer, logits, layout, self.rule)

    def differ(self, answers: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.bool_]:
        """True where two arrays of sets of spans, (...), differ, (...)."""
        return np.asarray(answers != expected)


Kind = Classes | Labels | Value | Spans
TextKind = Classes | Labels | Value  # the exits have K logits for the whole text
CLASSES = Classes()


def kind_of_text(thresholds: Iterable[float] | None, tolerance: float | None) -> TextKind:
    """The kind of a model with these label thresholds (probabilities), or this tolerance, or neither."""
    if tolerance is not None:
        return Value(tolerance)
    return CLASSES if thresholds is None else Labels.of(thresholds)


def differs(kind: Kind, one: Answer, other: Answer) -> bool:
    """True if two answers differ: in the class, in a label or span, or in the value by more than the tolerance."""
    match kind:
        case Value(tolerance) if isinstance(one, float) and isinstance(other, float):
            return not abs(one - other) <= tolerance  # NaN differs from every value
        case Classes() | Labels() | Value() | Spans():  # a shadow's answer may be of another kind
            return one != other
        case _:
            assert_never(kind)
