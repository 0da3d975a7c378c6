"""Fits all exits of a new classifier, including the last, to the labels of texts; the encoder stays frozen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from de3.exits.kinds import Labels
from de3.exits.recorded import Recorded
from de3.export import fit
from de3.export.fit import Array, Exits
from de3.export.training_set import Target, TrainingSet
from de3.progress import console

RIDGES = (0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)  # strongest first
FOLDS = 5
FEW = 3000  # texts; with fewer, the ridge is chosen on all folds instead of one
WORSE_LOSS = 1.5  # limit on the loss of the chosen ridge, relative to the smallest loss
WORSE = 2  # the search stops this many ridges after the one with the smallest loss
SEED = 0


@dataclass(frozen=True)
class Fitted:
    """Exits that were fitted to labels.

    Attributes:
        crossed: cross-fitted outputs: each text is run through exits that were fitted without it.
    """

    exits: Exits
    crossed: Recorded


def fit_labels(
    num_layers: int,
    texts: TrainingSet,
    fold: NDArray[np.int64],
    poolings: Sequence[str],
    as_served: Callable[[Exits], Exits],
) -> Fitted:
    """Fit exits to labels; the pooling, the ridge and the number of layers are chosen on held-out texts.

    num_layers: layers of the encoder. fold: the part in which each text is held out, (n,), from 0; there are at least
    two. as_served: rounds exits as the artifact does.
    """
    axes: fit.Axes = {}
    pooling, ridge = _search(texts, fold, num_layers // 2, poolings)
    ridges: list[float] = [ridge] * (num_layers + 1)
    start: list[fit.Linear | None] = [None] * (num_layers + 1)
    exits = fit.fit_with(texts, pooling, ridges, SEED, start, axes)
    crossed = fit.cross_fitted(texts, exits, ridges, SEED, axes, fold, as_served)
    depth = _depth(crossed.correct)
    right = ", ".join(f"{100 * share:.1f}" for share in crossed.correct.mean(0))
    fewer = f"; {depth} of {num_layers} layers are used" if depth < num_layers else ""
    console.print(
        f"ridge {ridge:g}; pooling: {'mean of the tokens' if pooling == 'mean' else 'first token'}; cross-validated "
        f"accuracy on {len(texts)} texts, by exit from the embeddings to the last layer: {right}%{fewer}",
        soft_wrap=True,
        highlight=False,
    )
    return Fitted(as_served(_cut(exits, depth)), _cut_record(crossed, depth))


def _search(
    texts: TrainingSet, fold: NDArray[np.int64], layer: int, poolings: Sequence[str]
) -> tuple[str, float]:
    """The pooling and ridge for all layers, by the accuracy of one layer's exit on held-out texts.

    For each pooling, chooses the strongest ridge that is about as accurate as the best (within a standard error of the
    difference), and whose loss is at most WORSE_LOSS times the smallest of these. The most accurate pooling wins.
    """
    best = (poolings[0], RIDGES[0], -1.0)
    for pooling in poolings:
        folds = int(fold.max()) + 1 if len(texts) < FEW else 1
        paths = fit.in_parallel(
            partial(_path, texts, fold, pooling, layer), folds, f"Choosing the ridge ({pooling})"
        )
        length = min(map(len, paths))
        both = np.concatenate([np.array(path[:length]) for path in paths], axis=2)  # (ridges, 2, texts)
        losses, correct = both[:, 0].mean(1), both[:, 1]
        lost = correct[correct.mean(1).argmax()] - correct
        is_near = lost.mean(1) <= lost.std(1) / np.sqrt(correct.shape[1])
        is_near &= losses <= WORSE_LOSS * losses[is_near].min()
        chosen = int(np.flatnonzero(is_near)[0])
        if correct[chosen].mean() > best[2]:
            best = (pooling, RIDGES[chosen], float(correct[chosen].mean()))
    return best[:2]


def _path(
    texts: TrainingSet, fold: NDArray[np.int64], pooling: str, layer: int, k: int
) -> list[NDArray[np.float64]]:
    """For each ridge, the losses of the n texts of fold k, and 1 for each correct answer, (2, n).

    Ridges are tried from the strongest on; the search stops WORSE ridges after the one with the smallest loss.
    """
    held, others = (texts.part(np.flatnonzero(rows)) for rows in (fold == k, fold != k))
    x = held.pooled(pooling, layer)
    path = list[NDArray[np.float64]]()
    for _, (weight, bias) in fit.fitted(others, pooling, layer, RIDGES, {}):
        logits = x @ weight.T + bias
        kind = held.target.kind
        correct = ~kind.differ(kind.answers(logits), held.target.answers)
        path.append(np.stack([_loss(logits, held.target), correct]))
        means = [float(loss.mean()) for loss, _ in path]
        if len(means) - 1 - int(np.argmin(means)) >= WORSE:
            break
    return path


def _loss(logits: Array, target: Target) -> NDArray[np.float64]:
    """The cross-entropy of each text, (n,); with several labels, summed over them."""
    z, wanted = logits.astype(np.float64), target.probabilities
    if isinstance(target.kind, Labels):
        return np.asarray((np.logaddexp(0, z) - wanted * z).sum(-1))
    z -= z.max(-1, keepdims=True)
    return np.asarray(np.log(np.exp(z).sum(-1)) - (wanted * z).sum(-1))


def _depth(correct: NDArray[np.bool_]) -> int:
    """The smallest number of layers whose exit is not clearly less accurate than the best layer's.

    correct: (n, exits). The embeddings' exit does not count, as a model has at least one layer. Clearly: by more than
    one standard error of the difference on the same texts.
    """
    correct = correct[:, 1:]
    lost = correct[:, correct.mean(0).argmax(), None].astype(np.float64) - correct
    is_near = lost.mean(0) <= lost.std(0) / np.sqrt(len(lost))
    return 1 + int(np.flatnonzero(is_near)[0])


def _cut(exits: Exits, depth: int) -> Exits:
    """The exits up to layer `depth`."""
    return replace(
        exits,
        classifiers=exits.classifiers[: depth + 1],
        spaces=exits.spaces[:depth],
        prototypes=exits.prototypes[:depth],
    )


def _cut_record(recorded: Recorded, depth: int) -> Recorded:
    """The outputs of the exits up to layer `depth`; this layer, now the last, has no prototypes."""
    distances = recorded.distances[:, : depth + 1].copy()
    distances[:, depth] = np.nan
    exits = slice(depth + 1)
    return replace(
        recorded,
        exit_layers=recorded.exit_layers[exits],
        logits=recorded.logits[:, exits],
        distances=distances,
    )
