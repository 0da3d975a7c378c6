"""Fits the signal `risk`: for each exit, the probability that its answer differs from full depth's.

A logistic regression per exit, on held-out samples. It needs no labels: the target is disagreement with full depth,
or with the original model where its answers are known.
"""

import numpy as np
from numpy.typing import NDArray

from de3.exits.reading import Weights
from de3.exits.recorded import Recorded
from de3.exits.signals import Risk

Floats = NDArray[np.float64]
RIDGE = 0.01  # penalty on standardized weights; the loss is summed over samples
MAX_STEPS = 100
FOLDS = 5  # cross-fitting folds
# Relative to 1 + |mean|; features that vary less are not used, as weights are divided by the spread.
MIN_SPREAD = 1e-4
UNUSED: Weights = (50.0, 0.0, 0.0, 0.0, 0.0)  # of an exit that is not used: a risk of 1


def fit(recorded: Recorded) -> Risk:
    """The risk of a model, fitted on the recorded exits of n samples."""
    features = recorded.risk_features
    differs = recorded.differs.astype(np.float64)
    weights: list[Weights | None] = [None] * (recorded.exit_layers[-1] + 1)
    for j, layer in enumerate(recorded.exit_layers[:-1]):
        if j < recorded.first_exit:
            weights[layer] = UNUSED
        else:
            weights[layer] = tuple(regress(features[:, j], differs[:, j]).tolist())
    return Risk(tuple(weights))


def label_weights(recorded: Recorded) -> list[Weights]:
    """For every exit, the last included, weights of the probability that its answer differs from the label."""
    features, wrong = recorded.risk_features, (~recorded.correct).astype(np.float64)
    return [tuple(regress(features[:, j], wrong[:, j]).tolist()) for j in range(wrong.shape[1])]


def cross_fit(recorded: Recorded, groups: NDArray[np.int64] | None = None) -> Floats:
    """Cross-fitted scores, (n, exits): each sample is scored by a risk that was fitted without its group.

    Scores are NaN at the last exit, and at every exit if all samples are in one group.

    groups: the group of each sample, (n,); if None, every sample is its own group. The groups are divided into FOLDS
    parts; each part is scored by a risk that was fitted on the others.
    """
    n = len(recorded.labels)
    group = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(int(group.max()) + 1)[group] % FOLDS
    scores = np.full(recorded.logits.shape[:2], np.nan)
    for k in range(FOLDS):
        inside = fold == k
        if inside.any() and not inside.all():
            scores[inside] = fit(recorded.rows(~inside)).scores(recorded.rows(inside))
    return scores


def regress(features: Floats, targets: Floats) -> Floats:
    """Weights (F,) of a logistic regression of targets (n,), 0 or 1, on features (n, F), the first of which is 1.

    A ridge penalty on the standardized weights keeps them finite if the targets are separable or all equal. A
    feature that hardly varies (see MIN_SPREAD) gets the weight 0.
    """
    x = features[:, 1:]
    mean, spread = x.mean(0), x.std(0)
    varies = spread > MIN_SPREAD * (1 + np.abs(mean))
    z = np.ones((len(x), 1 + int(varies.sum())))
    z[:, 1:] = (x[:, varies] - mean[varies]) / spread[varies]
    ridge = np.full(z.shape[1], RIDGE)
    ridge[0] = 1e-3
    w = np.zeros(z.shape[1])
    loss = _loss(z, targets, w, ridge)
    for _ in range(MAX_STEPS):  # Newton's method, each step halved until the loss falls
        p = 1 / (1 + np.exp(-np.clip(z @ w, -500, 500)))
        gradient = z.T @ (p - targets) + ridge * w
        hessian = (z * (p * (1 - p))[:, None]).T @ z + np.diag(ridge)
        step = np.linalg.solve(hessian, gradient)
        while (new := _loss(z, targets, w - step, ridge)) > loss and np.abs(step).max() > 1e-9:
            step = step / 2
        w, loss = w - step, min(new, loss)
        if np.abs(step).max() < 1e-9:
            break
    weights = np.zeros(features.shape[1])
    weights[1:][varies] = w[1:] / spread[varies]
    weights[0] = w[0] - (weights[1:] * mean).sum()
    return weights


def _loss(z: Floats, targets: Floats, w: Floats, ridge: Floats) -> float:
    logits = z @ w
    return float((np.logaddexp(0, logits) - targets * logits).sum() + 0.5 * (ridge * w * w).sum())
