"""One exit's result for one sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, log1p, nan

from de3.exits.spans import Array, Layout, SpanRule, TokenReading, Unsure, unsure_of

LOG_2 = log(2.0)

# A class (number or name), the numbers of a multi-label model's labels, a regression model's value, or a set of spans.
Answer = int | str | list[int] | float | frozenset[tuple[int, int, str]]


@dataclass(slots=True)
class Reading:
    """An exit's answer to one sample, and the inputs of the signals.

    Attributes:
        layer: layer of the exit.
        logits: (K,).
        probs: class probabilities, (K,); empty in a regression model.
        label: the most probable class (ties: lowest index); 0 in a regression model.
        margin: the highest logit minus the second highest; in a multi-label model, the smallest distance of a logit
            from its threshold; NaN in a regression model.
        entropy: the local signal, in [0, 1]; NaN in a regression model.
        distance_ratio: the global signal, in [0, 1]; None at an exit without prototypes.
        nearest: distance to the nearest prototype, in [0, 2] up to rounding; None at an exit without prototypes.
        score: the signal's score at this exit, in [0, 1]; None if it was not computed or is not defined.
        labels: the labels of a multi-label model that are above their thresholds; None in other models.
        value: the answer of a regression model; None in other models.
        unsure: how unsure a token classifier is of the tokens; None in other models.
        tokens: labels of the tokens, from which the spans are made; None in other models, and if it is not needed.
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
    labels: list[int] | None = None
    value: float | None = None
    unsure: Unsure | None = None
    tokens: TokenReading | None = None

    @property
    def answer(self) -> Answer:
        """The class, the labels of a multi-label model, the value of a regression model, or the set of spans."""
        if self.tokens is not None:
            return self.tokens.answer
        if self.value is not None:
            return self.value
        return self.label if self.labels is None else self.labels


def read(layer: int, logits: list[float], distances: list[float] | None) -> Reading:
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
        return Reading(layer, logits, probs, label, margin, entropy, None, None)
    # Rounding in float32 can put a cosine distance slightly outside [0, 2].
    r1, r2 = min(max(distances[label], 0.0), 2.0), min(max(distances[second], 0.0), 2.0)
    largest = r1 if r1 > r2 else r2
    ratio = 0.5 * (1.0 + (r1 - r2) / largest) if largest else 0.5
    return Reading(layer, logits, probs, label, margin, entropy, ratio, min(distances))


def read_labels(layer: int, logits: list[float], thresholds: Sequence[float]) -> Reading:
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
    return Reading(layer, logits, probs, label, margin, entropy, None, None, labels=decided)


def read_value(layer: int, logits: list[float]) -> Reading:
    """The reading of one exit of a regression model, whose only logit is its answer."""
    return Reading(layer, logits, [], 0, nan, nan, None, None, value=logits[0])


def read_tokens(layer: int, logits: Array, layout: Layout, rule: SpanRule) -> Reading:
    """The reading of one exit of a token classifier, from the logits of its tokens, (T, K).

    Like `read`, it agrees with `native/rule.c`.
    """
    unsure = unsure_of(logits, rule.counted(layout), rule.outside)
    tokens = TokenReading(logits, layout, rule)
    return Reading(layer, [], [], 0, nan, nan, None, None, unsure=unsure, tokens=tokens)


def differs(one: Answer, other: Answer, tolerance: float | None = None) -> bool:
    """True if two answers differ: in the class, in a label or span, or in the value by more than `tolerance` or 0."""
    if isinstance(one, float) and isinstance(other, float):
        return not abs(one - other) <= (tolerance or 0.0)  # NaN differs from every value
    return one != other


def sigmoid(x: float) -> float:
    """1/(1 + exp(−x)), without overflow."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def _second(logits: list[float], first: int) -> int:
    """The class ranked second (ties: lowest index)."""
    return max((k for k in range(len(logits)) if k != first), key=logits.__getitem__)
