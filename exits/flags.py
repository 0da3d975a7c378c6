"""What a guard looks for, and one-sided exits: a text leaves early only with an answer that is safe.

A text that would exit with a flagged answer runs to the last layer, past all later exits. So early exits add no false
alarm, and at any τ no other answers differ from full depth than with exits for every answer: a bound on those holds for
any flag, too. One thing can go wrong: a text that full depth flags leaves early as safe, that is, it is missed.
`exits.criteria.MissedFlag` counts such texts.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from de3.exits import formulas
from de3.exits.kinds import Classes, Labels, TextKind, Value
from de3.exits.reading import ClassReading, LabelsReading, Reading, SpansReading, TextReading, ValueReading


@dataclass(frozen=True)
class Flag:
    """The answers that are flagged.

    - Classes: those where the probabilities of the labels add up to at least the threshold.
    - Labels: those where the probability of a label is at least its threshold.
    - A value: those of at least the threshold or, with `is_below`, of at most the threshold.
    - Spans: those with a span. Labels and thresholds are not used.

    Attributes:
        labels: their indices, ascending; for a value or spans, 0.
        thresholds: that of each label, for labels; otherwise one.
    """

    labels: tuple[int, ...] = (0,)
    thresholds: tuple[float, ...] = (0.0,)
    is_below: bool = False

    @cached_property
    def indices(self) -> bytes:
        """The labels for the kernels."""
        return np.array(self.labels, np.int32).tobytes()

    @cached_property
    def least(self) -> bytes:
        """The thresholds for the kernels, one for each label."""
        return np.resize(np.array(self.thresholds, np.float64), len(self.labels)).tobytes()

    @property
    def key(self) -> str:
        """A short text that identifies it, for the state of evidence."""
        return f"{','.join(map(str, self.labels))}{'<' if self.is_below else '>'}{','.join(map(repr, self.thresholds))}"

    def label(self, reading: ClassReading | LabelsReading) -> int:
        """The label that is most probable or, for labels, whose probability is highest above its threshold."""
        if isinstance(reading, LabelsReading):
            above = (reading.probs[k] - least for k, least in zip(self.labels, self.thresholds, strict=True))
            return max(zip(above, self.labels, strict=True))[1]
        return max(self.labels, key=reading.probs.__getitem__)

    def prob(self, reading: ClassReading | LabelsReading) -> float:
        """The probability that one of the labels is right; for labels, of `label`."""
        probs, total = reading.probs, 0.0
        if isinstance(reading, LabelsReading):
            return probs[self.label(reading)]
        for k in self.labels:  # not sum(), see exits.reading.read
            total += probs[k]
        return total

    def degree(self, reading: TextReading) -> float:
        """How close an answer is to being flagged, or how far above the threshold."""
        if isinstance(reading, ValueReading):
            return -reading.value if self.is_below else reading.value
        return self.prob(reading)

    def is_raised(self, reading: Reading) -> bool:
        """True if this answer is flagged. A probability or value that is not a number is."""
        match reading:
            case ClassReading():
                return not self.prob(reading) < self.thresholds[0]
            case LabelsReading():
                return any(
                    not reading.probs[k] < least
                    for k, least in zip(self.labels, self.thresholds, strict=True)
                )
            case ValueReading(value=value):
                return not value > self.thresholds[0] if self.is_below else not value < self.thresholds[0]
            case SpansReading():
                return bool(reading.spans)
            case _:
                assert_never(reading)

    def blocks(self, reading: Reading) -> bool:
        """True if no text exits early with this reading; `native/rule.c: is_blocked` agrees bit for bit.

        A token that may be in a span blocks, whether or not a span is made of it.
        """
        return reading.unsure.found if isinstance(reading, SpansReading) else self.is_raised(reading)

    def probs(self, kind: Classes | Labels, logits: NDArray[np.float32]) -> formulas.Floats:
        """The probability that one of the labels is right, of logits (..., K), (...); for labels, the highest."""
        labels = list(self.labels)
        if isinstance(kind, Labels):
            return np.asarray(formulas.sigmoid(logits)[..., labels].max(-1))
        return np.asarray(formulas.softmax(logits)[..., labels].sum(-1))

    def raised(self, kind: TextKind, logits: NDArray[np.float32]) -> NDArray[np.bool_]:
        """True where the answer that logits (..., K) give is flagged, (...)."""
        labels, least = list(self.labels), np.array(self.thresholds)
        match kind:
            case Classes():
                return np.asarray(~(self.probs(kind, logits) < least[0]))
            case Labels():
                return np.asarray((~(formulas.sigmoid(logits)[..., labels] < least)).any(-1))
            case Value():
                value: NDArray[Any] = logits[..., 0].astype(np.float64)
                return np.asarray(~(value > least[0]) if self.is_below else ~(value < least[0]))
            case _:
                assert_never(kind)
