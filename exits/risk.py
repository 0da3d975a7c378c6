"""Fits the signal `risk`: for each exit, the probability that its answer differs from full depth's.

A logistic regression per exit, on held-out samples. It needs no labels: the target is disagreement with full depth,
or with the original model where its answers are known.

Where the samples are enough to show that it helps, risk also weighs the exit's pooled state. The ridge of these weights
is a prior: before any sample, the state moves z by about 0.7 (a standard deviation). On the demo model it was as good,
from 500 to 6,000 samples, as the best ridge in hindsight (lab/docs/experiments.md).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from de3.exits.reading import Weights
from de3.exits.recorded import Recorded
from de3.exits.signals import FEATURES, UNUSED, Risk, probabilities

Floats = NDArray[np.float64]
RIDGE = 0.01  # penalty on standardized weights; the loss is summed over samples
STATE_RIDGE = 2.0  # that of the state's weights, by dimension of the state
MAX_SAMPLES = 6000  # to which the state's weights are fitted: a limit on time
MIN_DIFFERING = 20  # of the samples; with fewer, the state's weights are not tried
MAX_STEPS = 100
MAX_DECREMENT = 1e-9  # of the loss, in the last step
FOLDS = 5  # cross-fitting folds
# Relative to 1 + |mean|; features that vary less are not used, as weights are divided by the spread.
MIN_SPREAD = 1e-4


@dataclass(frozen=True)
class _Exit:
    """n samples at an exit.

    Attributes:
        features: risk's features, (n, 5).
        differs: 1 where the answer differs, (n,).
        groups: number of each sample's group, (n,).
        states: the pooled states, (n, hidden); None if they are not recorded, or the answer is not a class.
    """

    features: Floats
    differs: Floats
    groups: NDArray[np.int64]
    states: NDArray[np.float32] | None

    def rows(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "_Exit":
        """The samples at these rows: a mask, (n,), or indices."""
        states = None if self.states is None else self.states[which]
        return _Exit(self.features[which], self.differs[which], self.groups[which], states)

    def probabilities(self, weights: Floats) -> Floats:
        """The risk of each sample, (n,)."""
        return probabilities(weights, self.features, self.states)

    def fit(self) -> Floats:
        """The weights, (5,) or, if the state helps to predict samples of other groups, (5 + hidden,)."""
        if self.states is None or self.differs.sum() < MIN_DIFFERING:
            return self.few()
        some = self
        if len(self.differs) > MAX_SAMPLES:
            some = self.rows(np.random.default_rng(0).permutation(len(self.differs))[:MAX_SAMPLES])
        gain, fold = 0.0, _folds(some.groups, 2)
        for k in range(2):
            inside, others = some.rows(fold == k), some.rows(fold != k)
            if len(inside.differs) and len(others.differs):
                gain += inside.loss(others.few()) - inside.loss(others.all())
        return some.all() if gain > 0 else self.few()

    def loss(self, weights: Floats) -> float:
        """The logarithmic loss of the risk with these weights, summed over the samples."""
        risk = np.clip(self.probabilities(weights), 1e-12, 1 - 1e-12)
        return -float(np.log(np.where(self.differs > 0, risk, 1 - risk)).sum())

    def few(self) -> Floats:
        """Weights of the features, (5,)."""
        return regress(self.features, self.differs)

    def all(self) -> Floats:
        """Weights of the features and of the state, in six digits to keep manifests short, (5 + hidden,)."""
        assert self.states is not None
        weights = regress(np.hstack([self.features, self.states]), self.differs)
        weights[FEATURES:] = [float(f"{weight:.6g}") for weight in weights[FEATURES:]]
        return weights


def _exit_of(recorded: Recorded, j: int, features: Floats, groups: NDArray[np.int64] | None) -> _Exit:
    """The samples at exit j. features: of all exits, (n, exits, 5)."""
    group = np.arange(len(features)) if groups is None else np.unique(groups, return_inverse=True)[1]
    states = recorded.states_at(j) if recorded.states is not None and recorded.kind.sees_state else None
    return _Exit(features[:, j], recorded.differs[:, j].astype(np.float64), group, states)


def _folds(groups: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """A random part of `count` for each sample, (n,), the same for all of a group."""
    return np.asarray(np.random.default_rng(0).permutation(int(groups.max()) + 1)[groups] % count)


def fit(recorded: Recorded, groups: NDArray[np.int64] | None = None) -> Risk:
    """The risk of a model, fitted on the recorded exits of n samples; groups: see `cross_fit`."""
    features = recorded.risk_features
    weights: list[Weights | None] = [None] * (recorded.exit_layers[-1] + 1)
    for j, layer in enumerate(recorded.exit_layers[:-1]):
        is_used = j not in recorded.unused
        weights[layer] = tuple(_exit_of(recorded, j, features, groups).fit().tolist()) if is_used else UNUSED
    return Risk(tuple(weights))


def label_weights(recorded: Recorded) -> list[Weights]:
    """For every exit, the last included, weights of the probability that its answer differs from the label."""
    features, wrong = recorded.risk_features, (~recorded.correct).astype(np.float64)
    return [tuple(regress(features[:, j], wrong[:, j]).tolist()) for j in range(wrong.shape[1])]


def cross_fit(
    recorded: Recorded, groups: NDArray[np.int64] | None = None, fold: NDArray[np.int64] | None = None
) -> Floats:
    """Cross-fitted scores, (n, exits): each sample is scored by a risk that was fitted without its group.

    Scores are NaN at the last exit, and at every exit if all samples are in one group.

    groups: the group of each sample, (n,); if None, every sample is its own group. The groups are divided into FOLDS
    parts; each part is scored by a risk that was fitted on the others. fold: instead, the part of each sample, (n,).
    """
    features, scores = recorded.risk_features, np.full(recorded.logits.shape[:2], np.nan)
    for j in range(len(recorded.exit_layers) - 1):
        one = _exit_of(recorded, j, features, groups)
        part = _folds(one.groups, FOLDS) if fold is None else fold
        for inside in (part == k for k in range(FOLDS)):
            if inside.any() and not inside.all():
                is_used = j not in recorded.unused
                weights = one.rows(~inside).fit() if is_used else np.array(UNUSED)
                scores[inside, j] = one.rows(inside).probabilities(weights)
    return scores


def regress(features: Floats, targets: Floats) -> Floats:
    """Weights (F,) of a logistic regression of targets (n,), 0 or 1, on features (n, F), the first of which is 1.

    Columns from FEATURES on are a state. A ridge penalty on the standardized weights keeps them finite if the targets
    are separable or all equal. A feature that hardly varies (see MIN_SPREAD) gets the weight 0.
    """
    x = features[:, 1:]
    mean, spread = x.mean(0), x.std(0)
    varies = spread > MIN_SPREAD * (1 + np.abs(mean))
    z = np.ones((len(x), 1 + int(varies.sum())))
    z[:, 1:] = (x[:, varies] - mean[varies]) / spread[varies]
    few = 1 + int(varies[: FEATURES - 1].sum())
    ridge = np.full(z.shape[1], STATE_RIDGE * (z.shape[1] - few))
    ridge[:few] = RIDGE
    ridge[0] = 1e-3
    w = _newton(z[:, :few], targets, ridge[:few], np.zeros(few))
    if few < len(ridge):
        w = _newton(z, targets, ridge, np.concatenate([w, np.zeros(len(ridge) - few)]))
    weights = np.zeros(features.shape[1])
    weights[1:][varies] = w[1:] / spread[varies]
    weights[0] = w[0] - (weights[1:] * mean).sum()
    return weights


def _newton(z: Floats, targets: Floats, ridge: Floats, w: Floats) -> Floats:
    """The weights with the smallest loss, (F,), by Newton's method from `w`, with steps halved until the loss falls.

    With a state, the Hessian, which takes most of the time, is computed in float32; it only directs the steps.
    """
    loss = _loss(z, targets, w, ridge)
    for _ in range(MAX_STEPS):
        p = 1 / (1 + np.exp(-np.clip(z @ w, -500, 500)))
        gradient = z.T @ (p - targets) + ridge * w
        root: NDArray[np.floating] = z * np.sqrt(p * (1 - p))[:, None]
        if z.shape[1] > FEATURES:
            root = root.astype(np.float32)
        step = np.linalg.solve(root.T @ root + np.diag(ridge), gradient)
        decrement = float(gradient @ step)
        while (new := _loss(z, targets, w - step, ridge)) > loss and decrement > MAX_DECREMENT:
            step, decrement = step / 2, decrement / 2
        w, loss = w - step, min(new, loss)
        if decrement <= MAX_DECREMENT:
            break
    return w


def _loss(z: Floats, targets: Floats, w: Floats, ridge: Floats) -> float:
    logits = z @ w
    return float((np.logaddexp(0, logits) - targets * logits).sum() + 0.5 * (ridge * w * w).sum())
