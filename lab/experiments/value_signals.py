"""Exit signals of a regression model, fitted on recorded pairs, and its answers at equal speed-up.

A score predicts |ŷ_m − ŷ_M|, the distance of exit m's value from full depth's, so it needs no labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from torch import Tensor

from de3.exits.recorded import Recorded
from de3.training.evaluate import correlation, ranks
from lab.experiments import measures
from lab.experiments.anchors import Anchors
from lab.experiments.measures import Floats

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
PLOTTED = np.round(np.arange(1, 6.01, 0.25), 2).tolist()
RIDGES = 10.0 ** np.arange(-4, 2.1, 0.5)  # of standardized features
FOLDS = 5


@dataclass(frozen=True)
class Pairs:
    """Recorded pairs of a part.

    Attributes:
        states: h^(m), (n, exits, hidden).
        values: of each exit's head, (n, exits).
        labels: (n,).
        first: the layer of the first exit.
        geometry: features from anchors, (n, exits, 3), by lab.experiments.anchors; None: there are none.
    """

    states: Tensor
    values: Tensor
    labels: Tensor
    first: int = 0
    geometry: Tensor | None = None

    def with_anchors(self, anchors: Anchors, temperatures: Tensor) -> Self:
        """The same with the geometry of anchors."""
        return replace(self, geometry=anchors.geometry(self.states, self.values, temperatures))

    def without_first(self) -> Self:
        """The same without the first exit."""
        geometry = None if self.geometry is None else self.geometry[:, 1:]
        return replace(
            self,
            states=self.states[:, 1:],
            values=self.values[:, 1:],
            first=self.first + 1,
            geometry=geometry,
        )

    @property
    def off(self) -> Floats:
        """|ŷ_m − ŷ_M|, (n, exits)."""
        return (self.values - self.values[:, -1:]).abs().double().numpy()

    @property
    def recorded(self) -> Recorded:
        """The exits, as lab.experiments.measures takes them."""
        logits = self.values.numpy()[..., None]
        layers = [self.first + j for j in range(logits.shape[1])]
        labels = self.labels.double().numpy()
        return Recorded(layers, logits, np.full_like(logits, np.nan), labels, tolerance=1.0)


class Fold(NamedTuple):
    """The pairs that signals are fitted on, and those that they are measured on."""

    held: Pairs
    unseen: Pairs


Features = Callable[[Pairs, int], Floats]  # of an exit, (n, F)


def of_value(p: Pairs, j: int) -> Floats:
    """The features of exits.risk for a regression: the value and its square."""
    v = p.values[:, j].double().numpy()
    return np.stack([v, v * v], 1)


def of_change(p: Pairs, j: int) -> Floats:
    """The change of the value since the exit before; 0 at the first."""
    change = p.values[:, j] - p.values[:, max(j - 1, 0)]
    return change.abs().double().numpy()[:, None]


def of_states(p: Pairs, j: int) -> Floats:
    """h^(m) itself."""
    return p.states[:, j].double().numpy()


def of_anchors(p: Pairs, j: int) -> Floats:
    """The features from the anchors."""
    assert p.geometry is not None
    return p.geometry[:, j].double().numpy()


PLAIN = "value, value²"
FITTED: dict[str, tuple[Features, ...]] = {
    PLAIN: (of_value,),
    "value, value², change": (of_value, of_change),
    "h": (of_states,),
    "anchors": (of_anchors,),
    "value, value², anchors": (of_value, of_anchors),
    "value, value², change, anchors": (of_value, of_change, of_anchors),
}
RAW = {"distance ratio as it is": 1}
HINDSIGHT = "hindsight: |ŷ_m − ŷ_M| itself"
ONE_LAYER = "one layer for all"
SIGNALS = (*FITTED, *RAW, HINDSIGHT, ONE_LAYER)


def ridge(x: Floats, y: Floats, z: Floats) -> Floats:
    """Predictions for z (k, F) by a ridge regression of y (n,) on x (n, F), the ridge chosen by cross-validation."""
    fold = np.random.default_rng(0).permutation(len(x)) % FOLDS
    errors = np.zeros(len(RIDGES))
    for k in range(FOLDS):
        inside = fold == k
        errors += np.square(_ridges(x[~inside], y[~inside], x[inside], RIDGES) - y[inside]).sum(1)
    return np.asarray(_ridges(x, y, z, RIDGES[[errors.argmin()]])[0])


def _ridges(x: Floats, y: Floats, z: Floats, ridges: Floats) -> Floats:
    """Predictions by each ridge, (ridges, k)."""
    mean, spread = x.mean(0), x.std(0) + 1e-9
    x, z = (x - mean) / spread, (z - mean) / spread
    strengths, axes = np.linalg.eigh(x.T @ x / len(x))
    along = axes.T @ (x.T @ (y - y.mean()) / len(x))
    return np.stack([z @ (axes @ (along / (strengths + r))) + y.mean() for r in ridges])


def score(name: str, held: Pairs, unseen: Pairs) -> Floats:
    """A signal's scores of unseen pairs, (n, exits), fitted on held-out ones; infinite at the last exit."""
    exits = range(held.values.shape[1] - 1)
    if name == HINDSIGHT:
        columns = [unseen.off[:, j] for j in exits]
    elif name in RAW:
        columns = [of_anchors(unseen, j)[:, RAW[name]] for j in exits]
    else:

        def features(p: Pairs, j: int) -> Floats:
            return np.concatenate([of(p, j) for of in FITTED[name]], 1)

        columns = [ridge(features(held, j), held.off[:, j], features(unseen, j)) for j in exits]
    return np.stack([*columns, np.full(len(unseen.labels), np.inf)], 1)


def of_one_layer(unseen: Pairs, speedup: float) -> Floats:
    """The values of the layer with this speed-up, for all pairs, (n,)."""
    layers = unseen.recorded.exit_layers
    return np.asarray(unseen.recorded.answers[:, layers.index(round(layers[-1] / speedup))])


def resampled(answers: Floats, labels: Floats, shares: Floats) -> Floats:
    """Pearson's correlation of answers (k, n) with labels (n,) in each resample, (B, k).

    shares: of each pair in each resample, (B, n), rows of sum 1.
    """
    x, y = (answers - answers.mean(1, keepdims=True)).T, (labels - labels.mean())[:, None]
    mean_x, square_x, product, mean_y, square_y = (shares @ v for v in (x, x * x, x * y, y, y * y))
    return np.asarray((product - mean_x * mean_y) / np.sqrt((square_x - mean_x**2) * (square_y - mean_y**2)))


def compare(of: list[Floats], plain: list[Floats], labels: Floats, shares: Floats) -> dict[str, Any]:
    """Both correlations of answers, the mean of the seeds, and their gains over plain ones with 95% intervals.

    Spearman's resamples keep the ranks of the whole sample.
    """
    exact = np.mean([correlation(a, labels) for a in of], 0)
    gains = exact - np.mean([correlation(a, labels) for a in plain], 0)
    found: dict[str, Any] = {}
    for i, name in enumerate(("pearson", "spearman")):
        shown = ranks if name == "spearman" else np.asarray
        both = np.stack([shown(a) for a in of + plain])
        each = resampled(both, shown(labels), shares)
        differences = each[:, : len(of)].mean(1) - each[:, len(of) :].mean(1)
        found[name] = exact[i]
        found[f"{name}_gain"] = [gains[i], *np.quantile(differences, (0.025, 0.975))]
    return found


def measure(folds: Sequence[Fold], plain: Sequence[Fold], names: Sequence[str] = SIGNALS) -> dict[str, Any]:
    """Signals, the mean of folds (seeds) of the same unseen pairs, and their gains over the plain signal of others."""
    labels = folds[0].unseen.labels.double().numpy()
    n, rng = len(labels), np.random.default_rng(0)
    shares = rng.multinomial(n, np.full(n, 1 / n), measures.BOOTSTRAPS) / n

    def scored(name: str, of: Sequence[Fold]) -> list[tuple[Fold, Floats | None]]:
        return [(fold, None if name == ONE_LAYER else score(name, *fold)) for fold in of]

    def answers(of: list[tuple[Fold, Floats | None]], speedup: float) -> list[Floats]:
        return [_answers(fold, scores, speedup) for fold, scores in of]

    base = scored(PLAIN, plain)
    results: dict[str, Any] = {}
    for name in names:
        of = scored(name, folds)
        known = [_knows(scores, fold.unseen.off) for fold, scores in of if scores is not None]
        results[name] = {
            "speedups": {
                f"{s:g}": compare(answers(of, s), answers(base, s), labels, shares) for s in SPEEDUPS
            },
            "curve": [
                np.mean([correlation(a, labels)[0] for a in answers(of, s)])
                for s in (PLOTTED if name != ONE_LAYER else ())
            ],
            "knows": np.mean(known, 0) if known else [],
        }
    return results


def _answers(fold: Fold, scores: Floats | None, speedup: float) -> Floats:
    """The values that unseen pairs exit with, (n,)."""
    if scores is None:
        return of_one_layer(fold.unseen, speedup)
    recorded = fold.unseen.recorded
    return measures.right_at(scores, recorded, speedup, recorded.answers)


def _knows(scores: Floats, off: Floats) -> list[float]:
    """Spearman's correlation of scores with |ŷ_m − ŷ_M|, both (n, exits), at every exit but the last."""
    return [correlation(scores[:, j], off[:, j])[1] for j in range(off.shape[1] - 1)]
