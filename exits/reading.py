"""One exit's result for one sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, log, log1p, nan

LOG_2 = log(2.0)

# A class or several labels, by number or by name; or a value.
Answer = int | str | list[int] | float


@dataclass(slots=True)
class Reading:
    """An exit's answer to one sample, and what the signals are computed from.

    Attributes:
        layer: the exit's.
        logits: K of them.
        probs: class probabilities, K of them; none of a regression model.
        label: the most probable class (ties: lowest index).
        margin: the highest logit minus the second; of a multi-label model how far the logit nearest to its threshold is
            from it; of a regression model NaN.
        entropy: the local signal, in [0, 1]; of a regression model NaN.
        distance_ratio: the global signal, in [0, 1]; None at an exit without prototypes.
        nearest: distance to the nearest prototype, in [0, 2]; None at an exit without prototypes.
        score: the signal's score at this exit, in [0, 1]; None if it was not computed or is not defined.
        labels: of a multi-label model those above their threshold; None: classes exclude each other.
        value: the answer of a regression model; None: it has classes.
        distances: to the prototypes, K of them; None at an exit without prototypes.
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
    distances: list[float] | None = None

    @property
    def answer(self) -> Answer:
        """The class, the labels of a multi-label model, or the value of a regression model."""
        if self.value is not None:
            return self.value
        return self.label if self.labels is None else self.labels


def read(layer: int, logits: list[float], distances: list[float] | None) -> Reading:
    """Read one exit of one sample: its layer, its logits and its distances to the prototypes, K each.

    These are the formulas of `exits.formulas` for one sample, in plain Python: a server calls this after
    every layer, and NumPy takes 20 times as long for a handful of classes. `native/rule.c` does the same
    operations in the same order, so both make the same decision.
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
    return Reading(layer, logits, probs, label, margin, entropy, ratio, min(distances), distances=distances)


def read_labels(layer: int, logits: list[float], thresholds: Sequence[float]) -> Reading:
    """Read one exit of a multi-label model: each label has a probability of its own, σ(logit), and a threshold.

    thresholds: as logits, K of them. The entropy is that of K independent labels, divided by K·log 2. As `read`, in
    agreement with `native/rule.c`.
    """
    total, margin = 0.0, inf
    for x, threshold in zip(logits, thresholds, strict=True):
        far = abs(x)
        e = exp(-far)
        total += log1p(e) + far * e / (1.0 + e)
        gap = abs(x - threshold)
        margin = gap if gap < margin else margin
    entropy = min(max(total / (len(logits) * LOG_2), 0.0), 1.0)
    probs = [sigmoid(x) for x in logits]
    decided = [k for k, threshold in enumerate(thresholds) if logits[k] > threshold]
    label = logits.index(max(logits))
    return Reading(layer, logits, probs, label, margin, entropy, None, None, labels=decided)


def read_value(layer: int, logits: list[float]) -> Reading:
    """Read one exit of a regression model: its only logit is its answer."""
    return Reading(layer, logits, [], 0, nan, nan, None, None, value=logits[0])


def differs(one: Answer, other: Answer, tolerance: float | None = None) -> bool:
    """Whether two answers differ: in the class, in any label, or in the value by more than the tolerance."""
    if isinstance(one, float) and isinstance(other, float):
        return not abs(one - other) <= (tolerance or 0.0)  # NaN differs from every value
    return one != other


def sigmoid(x: float) -> float:
    """1/(1 + exp(−x)), for any x."""
    return 1.0 / (1.0 + exp(-x)) if x >= 0 else exp(x) / (1.0 + exp(x))


def _second(logits: list[float], first: int) -> int:
    """The class ranked second (ties: lowest index)."""
    return max((k for k in range(len(logits)) if k != first), key=logits.__getitem__)
