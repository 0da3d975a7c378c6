"""The formulas of DE3-BERT (arXiv 2402.05948) on arrays: the two signals, their fusion, and the features of risk.

Local signal: the entropy of an exit's class probabilities. Global signal: the distance ratio, which compares
the sample's distances to the prototypes of the first- and the second-ranked class. Both are small when the
exit is confident.

Classes are the last axis; any axes may precede it. All functions compute in float64.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def softmax(logits: ArrayLike) -> Floats:
    """Class probabilities, shape (..., K), of logits, shape (..., K)."""
    values = np.asarray(logits, dtype=np.float64)
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def sigmoid(logits: ArrayLike) -> Floats:
    """The probability of each label on its own, of logits of any shape."""
    x = np.asarray(logits, dtype=np.float64)
    e = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, e) / (1.0 + e))


def entropy(probs: ArrayLike) -> Floats:
    """Entropy of probs (..., K) divided by log K, shape (...): 0 is certain, 1 is uniform.

    Raises ValueError for fewer than two classes.
    """
    p = np.asarray(probs, dtype=np.float64)
    if p.shape[-1] < 2:
        raise ValueError(f"entropy needs at least 2 classes, got {p.shape[-1]}")
    plogp = p * np.log(np.where(p > 0, p, 1.0))  # 0·log 0 = 0
    return np.asarray(np.clip(-plogp.sum(axis=-1) / np.log(p.shape[-1]), 0.0, 1.0) + 0.0)  # no −0.0


def distance_ratio(logits: ArrayLike, distances: ArrayLike) -> Floats:
    """DR (Eq. 11), shape (...), of logits and cosine distances to the prototypes, both (..., K).

    DR = ½·(1 + (r1 − r2)/max(r1, r2)), where r1 and r2 are the distances to the prototypes of the classes
    ranked first and second by the classifier (ties: lowest index). r1 = r2 = 0 gives ½; NaN distances (an exit
    without prototypes) give NaN.
    """
    # Logits, not probabilities: softmax can round two different logits to the same probability.
    ranked = np.argsort(-np.asarray(logits, dtype=np.float64), axis=-1, kind="stable")[..., :2]
    # Rounding in float32 can put a cosine distance slightly outside [0, 2].
    r = np.clip(np.take_along_axis(np.asarray(distances, dtype=np.float64), ranked, axis=-1), 0.0, 2.0)
    r1, r2 = r[..., 0], r[..., 1]
    largest = np.maximum(r1, r2)
    return np.asarray(0.5 * (1.0 + (r1 - r2) / np.where(largest == 0, 1.0, largest)))


def edr(entropy: ArrayLike, distance_ratio: ArrayLike, lam: float) -> Floats:
    """EDR (Eq. 12), shape (...): the weighted harmonic mean (λ + 1)/(λ/DR + 1/Entropy).

    λ = 0 is entropy alone and ignores DR, even NaN. Entropy 0, or DR 0 with λ > 0, gives 0.
    """
    h = np.asarray(entropy, dtype=np.float64)
    if lam == 0:
        return h
    dr = np.asarray(distance_ratio, dtype=np.float64)
    # Multiplied out, so that nothing is divided by a signal that is 0.
    denominator = lam * h + dr
    return np.asarray((lam + 1.0) * h * dr / np.where(denominator == 0, 1.0, denominator))


def risk_features(logits: ArrayLike, distances: ArrayLike) -> Floats:
    """The features of `exits.signals.Risk`, shape (..., 5): 1, margin, entropy, log entropy, log DR.

    logits and distances are (..., K); log DR is 0 where the distances are NaN (an exit without prototypes).
    """
    values = np.asarray(logits, dtype=np.float64)
    top = np.partition(values, -2, axis=-1)[..., -2:]
    return stacked(top[..., 1] - top[..., 0], entropy(softmax(values)), distance_ratio(values, distances))


def stacked(margin: Floats, h: Floats, ratio: Floats) -> Floats:
    """The features of risk, shape (..., 5), from margin, entropy and distance ratio (NaN if none), each (...)."""
    log_ratio = np.log(np.maximum(np.where(np.isnan(ratio), 1.0, ratio), 1e-12))
    return np.stack([np.ones_like(h), margin, h, np.log(np.maximum(h, 1e-12)), log_ratio], -1)


def value_features(values: ArrayLike) -> Floats:
    """The features of risk, shape (..., 5), from the values (...) of a regression model: 1, value, value², 0, 0."""
    y = np.asarray(values, dtype=np.float64)
    return np.stack([np.ones_like(y), y, y * y, np.zeros_like(y), np.zeros_like(y)], -1)


def label_entropy(logits: ArrayLike) -> Floats:
    """Entropy of K independent labels with the probabilities σ(logits), (..., K), divided by K·log 2, shape (...)."""
    magnitude = np.abs(np.asarray(logits, dtype=np.float64))
    e = np.exp(-magnitude)
    total = (np.log1p(e) + magnitude * e / (1.0 + e)).sum(axis=-1)
    return np.asarray(np.clip(total / (magnitude.shape[-1] * np.log(2.0)), 0.0, 1.0))
