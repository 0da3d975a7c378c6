"""One exit's result for one sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, log1p
from typing import ClassVar, assert_never

from de3.exits.spans import Array, Layout, Span, SpanRule, TokenReading, Unsure, unsure_of

LOG_2 = log(2.0)
SMALLEST = 1e-12  # lower bound on the argument of a logarithm
Weights = tuple[float, ...]  # of the features of risk; see signals.Risk

# A class (number or name), the numbers of a multi-label model's labels, a regression model's value, or a set of spans.
Answer = int | str | list[int] | float | frozenset[tuple[int, int, str]]


class _Text:
    """What all readings of a whole text share."""

    __slots__ = ()
    spans: ClassVar[Sequence[Span]] = ()
    state_term: float = 0.0  # only a ClassReading's may differ

    def finish(self) -> None:
        """Nothing is left to do; see SpansReading.finish."""


@dataclass(slots=True)
class ClassReading(_Text):
    """The reading of an exit whose classes are mutually exclusive.

    Attributes:
        layer: layer of the exit.
        logits: (K,).
        probs: class probabilities, (K,).
        label: the most probable class (ties: lowest index).
        margin: the highest logit minus the second highest.
        entropy: the local signal, in [0, 1].
        distance_ratio: the global signal, in [0, 1]; None at an exit without prototypes.
        nearest: distance to the nearest prototype, in [0, 2] up to rounding; None at an exit without prototypes.
        score: the signal's score at this exit, in [0, 1]; None if it was not computed or is not defined.
        state_term: the exit's pooled state times risk's weights of it (see signals.Risk); 0 if risk has none.
    """

    layer: int
    logits: list[float]
    probs: list[float]
    label: int
    margin: float
    entropy: float
    distance_ratio: float | None
    nearest: float | None
    score: float | None = None
    state_term: float = 0.0

    @property
    def answer(self) -> int:
        """The class."""
        return self.label

    def risk(self, w: Weights) -> float | None:
        """The sum of risk's weighted features (see signals.Risk); None without the prototypes that it needs."""
        return _risk(self.margin, self.entropy, self.distance_ratio, w)


@dataclass(slots=True)
class LabelsReading(_Text):
    """The reading of an exit of a multi-label model. See ClassReading for the attributes that are not listed.

    Attributes:
        margin: the smallest distance of a logit from its threshold.
        labels: the labels that are above their thresholds.
    """

    layer: int
    logits: list[float]
    probs: list[float]
    label: int
    margin: float
    entropy: float
    labels: list[int]
    score: float | None = None
    distance_ratio: ClassVar[None] = None
    nearest: ClassVar[None] = None

    @property
    def answer(self) -> list[int]:
        """The labels."""
        return self.labels

    def risk(self, w: Weights) -> float | None:
        """The sum of risk's weighted features (see signals.Risk); None for weights that need prototypes."""
        return _risk(self.margin, self.entropy, None, w)


@dataclass(slots=True)
class ValueReading(_Text):
    """The reading of an exit of a regression model, whose only logit is its answer."""

    layer: int
    value: float
    score: float | None = None
    entropy: ClassVar[None] = None
    distance_ratio: ClassVar[None] = None
    nearest: ClassVar[None] = None

    @property
    def logits(self) -> list[float]:
        """The only logit."""
        return [self.value]

    @property
    def answer(self) -> float:
        """The value."""
        return self.value

    def risk(self, w: Weights) -> float | None:
        """The sum of risk's weighted features (see signals.Risk)."""
        return w[0] + w[1] * self.value + w[2] * (self.value * self.value)


@dataclass(slots=True)
class SpansReading:
    """The reading of an exit of a token classifier.

    Attributes:
        unsure: how unsure the exit is of the tokens.
        tokens: labels of the tokens, from which the spans are made; None if they are not needed.
    """

    layer: int
    unsure: Unsure
    tokens: TokenReading | None
    score: float | None = None
    state_term: ClassVar[float] = 0.0
    entropy: ClassVar[None] = None
    distance_ratio: ClassVar[None] = None
    nearest: ClassVar[None] = None

    @property
    def spans(self) -> Sequence[Span]:
        """The spans, in order; none without tokens."""
        return () if self.tokens is None else self.tokens.spans

    def finish(self) -> None:
        """Make the spans, and release the logits of the tokens, which take more memory than the rest of a text."""
        if self.tokens is not None:
            self.tokens.finish()

    @property
    def answer(self) -> frozenset[tuple[int, int, str]]:
        """The set of spans, without their scores."""
        return frozenset(span[:3] for span in self.spans)

    def risk(self, w: Weights) -> float | None:
        """The sum of risk's weighted features (see signals.Risk)."""
        largest, total = max(self.unsure.largest, SMALLEST), max(self.unsure.total, SMALLEST)
        z = w[0] + w[1] * log(largest) + w[2] * log(total)
        return z + w[3] * log(max(self.unsure.tokens, 1)) + w[4] * self.unsure.found


TextReading = ClassReading | LabelsReading | ValueReading  # K logits for the whole text
Reading = TextReading | SpansReading


def _risk(margin: float, entropy: float, ratio: float | None, w: Weights) -> float | None:
    z = w[0] + w[1] * margin + w[2] * entropy + w[3] * log(max(entropy, SMALLEST))
    if w[4] == 0.0:
        return z
    return None if ratio is None else z + w[4] * log(max(ratio, SMALLEST))


def read(layer: int, logits: list[float], distances: list[float] | None) -> ClassReading:
    """The reading of one exit of one sample, from its logits and its distances to the prototypes, K each.

    distances: None at an exit without prototypes.

    This is `exits.formulas` in plain Python: a server calls it after every layer, and NumPy takes 20 times as long for
    a handful of classes. `native/rule.c` performs the same operations in the same order, so both make the
    same decision.
    """
    top = max(logits)
    label = logits.index(top)
    weights = [exp(x - top) for x in logits]
    total = 0.0
    for w in weights:  # not sum(): from Python 3.12 it uses compensated summation, unlike the C code
        total += w
    probs = [w / total for w in weights]
    # −Σ p·log p with log p = (x − top) − log total; 0·(−inf) cannot occur: logits are finite.
    mean = 0.0
    for p, x in zip(probs, logits, strict=True):
        mean += p * (x - top)
    entropy = (log(total) - mean) / log(len(logits))
    entropy = min(max(entropy, 0.0), 1.0)  # in this order NaN stays NaN, which is never below τ
    second = 1 - label if len(logits) == 2 else _second(logits, label)
    margin = top - logits[second]
    if distances is None:
        return ClassReading(layer, logits, probs, label, margin, entropy, None, None)
    # Rounding in float32 can put a cosine distance slightly outside [0, 2].
    r1, r2 = min(max(distances[label], 0.0), 2.0), min(max(distances[second], 0.0), 2.0)
    largest = r1 if r1 > r2 else r2
    ratio = 0.5 * (1.0 + (r1 - r2) / largest) if largest else 0.5
    return ClassReading(layer, logits, probs, label, margin, entropy, ratio, min(distances))


def read_labels(layer: int, logits: list[float], thresholds: Sequence[float]) -> LabelsReading:
    """The reading of one exit of a multi-label model, where each label has its own probability, σ(logit).

    thresholds: the labels' thresholds as logits, (K,). The entropy is that of K independent labels, divided by K·log 2.
    Like `read`, it agrees with `native/rule.c`.
    """
    total, margin = 0.0, inf
    for x, threshold in zip(logits, thresholds, strict=True):
        magnitude = abs(x)
        e = exp(-magnitude)
        total += log1p(e) + magnitude * e / (1.0 + e)
        gap = abs(x - threshold)
        margin = gap if gap < margin else margin
    entropy = min(max(total / (len(logits) * LOG_2), 0.0), 1.0)
    probs = [sigmoid(x) for x in logits]
    decided = [k for k, threshold in enumerate(thresholds) if logits[k] > threshold]
    label = logits.index(max(logits))
    return LabelsReading(layer, logits, probs, label, margin, entropy, decided)


def read_tokens(layer: int, logits: Array, layout: Layout, rule: SpanRule) -> SpansReading:
    """The reading of one exit of a token classifier, from the logits of its tokens, (T, K).

    Like `read`, it agrees with `native/rule.c`.
    """
    unsure = unsure_of(logits, rule.counted(layout), rule.outside)
    return SpansReading(layer, unsure, TokenReading(logits, layout, rule))


def label_of(reading: Reading, names: Sequence[str]) -> str:
    """The label of a text: a multi-label model's joined by commas, a regression model's the name of its value.

    Not for a token classifier.
    """
    match reading:
        case ClassReading():
            return names[reading.label]
        case LabelsReading():
            return ", ".join(names[k] for k in reading.labels)
        case ValueReading():
            return names[0]
        case SpansReading():
            raise ValueError("a text has spans, not a label")
        case _:
            assert_never(reading)


def sigmoid(x: float) -> float:
    """1/(1 + exp(−x)), without overflow."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def _second(logits: list[float], first: int) -> int:
    """The class ranked second (ties: lowest index)."""
    return max((k for k in range(len(logits)) if k != first), key=logits.__getitem__)
