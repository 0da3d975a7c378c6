"""Fits exits on the pooled states of an encoder's layers; changes no weights.

The exits of a stock classifier are fitted to its own answers, without labels. `export.labels` fits all exits of a new
classifier, the last included, to labels.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from os import cpu_count
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from de3.exits import calibration, risk
from de3.exits.calibration import FINE_TAUS, Samples
from de3.exits.kinds import CLASSES, Classes, Labels, Value
from de3.exits.recorded import Recorded
from de3.export.states import POOLINGS, TokenStates
from de3.export.training_set import Target, TrainingSet, sigmoid
from de3.progress import console, track

FOLDS = 4  # of cross-fitting: the risk is fitted to outputs of exits that were fitted without the text
HELD_OUT = 5  # the pooling and the ridges are chosen on a fifth of the texts
RIDGES = (1e-2, 1e-3, 1e-4)  # strongest first
TOKEN_RIDGES = (1e-3, 1e-4)  # ridges of a token classifier, of which there are more tokens than texts
VALUE_RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 1e-3)  # ridges of a regression model
STEPS, TOLERANCE = 100, 1e-6  # limits of L-BFGS, for each ridge
# For labels, which need less precise fits than probabilities: two thirds of the steps were as accurate as all.
LABEL_TOLERANCE = 1e-5
CURVATURE = 0.1  # assumed second derivative of the cross-entropy with respect to a logit: p(1 − p) at p ≈ 0.9
LR = 1e-3  # learning rate of the prototypical networks
BATCH = 64
GAMMA = 0.01  # γ of Eq. 1
BETAS, DECAY = (0.9, 0.999), 0.01  # parameters of AdamW
MAX_THREADS = 4  # each layer in progress takes the memory of several copies of its states

T = TypeVar("T")

Array = NDArray[np.float32]
Linear = tuple[Array, Array]  # weights (outputs, inputs) and bias (outputs,)
# Principal axes of a layer's standardized states: variances (rank,) and directions (hidden, rank).
Basis = tuple[NDArray[np.float64], NDArray[np.float64]]
# The axes of all or most of the texts, by pooling and layer. They only set the optimizer's coordinates, so fits to a
# part of the texts use them, too, if the part has ENOUGH texts per dimension. A smaller part does not span all axes:
# along the others, L-BFGS would stop before the effect of the start, which was fitted to texts outside the part, has
# decayed.
Axes = dict[tuple[str, int], Basis]
ENOUGH = 1.5
# From logits, which it may overwrite, and target probabilities, both (n, K), to the loss and its gradient with respect
# to the logits.
Loss = Callable[[Array, Array], tuple[float, Array]]


@dataclass(frozen=True)
class Exits:
    """Exits of every layer but the last; index = layer.

    Attributes:
        pooling: pooling of the states, "mean" or "cls"; "none": each token is classified.
        classifiers: weights (K, hidden) and bias (K,); also of the last layer, if has_last.
        spaces: the prototypical networks, weights (hidden, hidden) and bias (hidden,); empty without prototypes.
        prototypes: the prototypes in each space, (K, hidden).
        has_last: the last classifier is the model's last exit; otherwise, the model has its own.
    """

    pooling: str
    classifiers: list[Linear]
    spaces: list[Linear]
    prototypes: list[Array]
    has_last: bool = False

    @property
    def num_layers(self) -> int:
        """The number of the model's layers."""
        return len(self.classifiers) - self.has_last

    def recorded(self, of: TrainingSet) -> Recorded:
        """Record the outputs of all exits, including the last, for texts; the labels are the target's answers."""
        target, layers = of.target, list(range(self.num_layers + 1))
        logits = np.stack([target.outputs.astype(np.float32)] * len(layers), 1)
        distances = np.full_like(logits, np.nan)
        for layer, (weight, bias) in enumerate(self.classifiers):
            x = of.pooled(self.pooling, layer)
            logits[:, layer] = x @ weight.T + bias
            if layer < len(self.spaces):
                unit = _unit(x @ self.spaces[layer][0].T + self.spaces[layer][1])
                distances[:, layer] = 1 - unit @ _unit(self.prototypes[layer]).T
        return Recorded(
            *(layers, logits, distances, target.answers),
            kind=target.kind,
            states=partial(of.pooled, self.pooling),
        )


def fit(
    num_layers: int,
    texts: TrainingSet,
    seed: int,
    as_served: Callable[[Exits], Exits],
    poolings: Sequence[str] = POOLINGS,
) -> tuple[Exits, Recorded]:
    """Fit exits on every layer but the last; returns them as they are served, and their cross-fitted outputs.

    poolings: poolings to choose from (see `choose`). as_served: rounds exits as the artifact does.
    """
    axes: Axes = {}
    pooling, ridges, start = choose(num_layers, texts, seed, axes, poolings)
    axes = {key: basis for key, basis in axes.items() if key[0] == pooling}  # frees the others
    exits = fit_with(texts, pooling, ridges, seed, start, axes)
    fold = np.random.default_rng(seed).permutation(int(texts.groups.max()) + 1)[texts.groups] % FOLDS
    return as_served(exits), cross_fitted(texts, exits, ridges, seed, axes, fold, as_served)


def fit_tokens(tokens: TokenStates, seed: int) -> Exits:
    """Fit exits on every layer but the last of a token classifier, with the ridges that `choose` selects."""
    target = Target(tokens.logits, CLASSES)
    texts, axes = (
        TrainingSet(target, tokens.texts, lambda _, layer: tokens.states[layer]),
        dict[tuple[str, int], Basis](),
    )
    pooling, ridges, start = choose(len(tokens.states), texts, seed, axes, ("none",))
    return fit_with(texts, pooling, ridges, seed, start, axes)


def fit_with(
    texts: TrainingSet,
    pooling: str,
    ridges: Sequence[float],
    seed: int,
    start: Sequence[Linear | None],
    axes: Axes,
    is_quiet: bool = False,
) -> Exits:
    """Fit exits to texts, with a given pooling.

    ridges: the ridge of each layer but the last; if the target is labels, also of the last. start: classifiers from
    which the fits start, fitted to most of these texts, or to these and others; None: no such classifier. The loss is
    convex, so the start changes the time that a fit takes, not its result. axes: principal axes that are known already;
    those computed here are added. is_quiet: show no progress, and use one thread.
    """

    def one(layer: int) -> Linear:
        return next(fitted(texts, pooling, layer, (ridges[layer],), axes, start[layer]))[1]

    classifiers = in_parallel(one, len(ridges), "" if is_quiet else f"Fitting exits ({pooling})")
    return with_spaces(
        Exits(pooling, classifiers, [], [], texts.target.labels is not None), texts, seed, is_quiet
    )


def cross_fitted(
    texts: TrainingSet,
    exits: Exits,
    ridges: Sequence[float],
    seed: int,
    axes: Axes,
    fold: NDArray[np.int64],
    as_served: Callable[[Exits], Exits],
) -> Recorded:
    """Cross-fitted outputs, in the order of the texts: each text is run through exits that were fitted without it.

    exits: fitted to all texts, with these ridges; the fits start from them, except fits to labels, whose ridge is so
    small that the start might affect the result. fold: the part of each text, (n,), from 0. as_served: see `fit`.
    """
    start = exits.classifiers if texts.target.labels is None else [None] * len(ridges)

    def one(k: int) -> Recorded:
        inside, others = (texts.part(np.flatnonzero(rows)) for rows in (fold == k, fold != k))
        fitted = fit_with(others, exits.pooling, ridges, seed, start, axes, is_quiet=True)
        return as_served(fitted).recorded(inside)

    parts = in_parallel(one, int(fold.max()) + 1, "Cross-fitting")
    return Recorded.joined(parts).rows(np.argsort(np.argsort(fold, kind="stable")))


def choose(
    num_layers: int,
    texts: TrainingSet,
    seed: int,
    axes: Axes,
    poolings: Sequence[str] = POOLINGS,
) -> tuple[str, list[float], list[Linear]]:
    """Choose the pooling, and the ridge of each layer but the last; also returns the fitted classifiers.

    Both are chosen on a fifth of the texts, with exits fitted to the others. The tuning and certifying samples are not
    used.

    A group of texts is split only if there are at most HELD_OUT groups. axes: see `fit_with`.
    """
    is_held = _held_out(texts.groups, np.random.default_rng(seed))
    held, others = (texts.part(np.flatnonzero(rows)) for rows in (is_held, ~is_held))
    best, largest = (POOLINGS[0], list[float](), list[Linear]()), -1.0
    for pooling in poolings:
        one = partial(_chosen, others, held, pooling, axes)
        found = in_parallel(one, num_layers, f"Choosing ridges ({pooling})")
        ridges, classifiers = [ridge for ridge, _ in found], [classifier for _, classifier in found]
        if len(poolings) == 1:
            return pooling, ridges, classifiers
        recorded = with_spaces(Exits(pooling, classifiers, [], []), others, seed).recorded(held)
        mean_speedup = _mean_speedup(recorded)
        agreement = ", ".join(f"{100 * share:.1f}" for share in recorded.correct.mean(0)[:-1])
        console.print(
            f"exits on the {'mean of the tokens' if pooling == 'mean' else 'first token'} agree with full depth on "
            f"{agreement}% of {len(held)} texts, from the embeddings to the last layer but one; speed-up about "
            f"{calibration.times(mean_speedup)}",
            soft_wrap=True,
            highlight=False,
        )
        if mean_speedup > largest or not best[1]:
            best, largest = (pooling, ridges, classifiers), mean_speedup
    return best


def in_parallel(one: Callable[[int], T], count: int, description: str) -> list[T]:
    """The results of `one` for each layer or fold, from 0, computed in several threads.

    description: label of the progress bar; "": no progress bar, and no additional threads. BLAS uses one thread in
    each: its threads spin while they wait for each other, so on a busy machine, a fit with two of them took ten times
    as long.
    """
    from threadpoolctl import threadpool_limits

    if not description:
        return [one(i) for i in range(count)]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(MAX_THREADS, cpu_count() or 1)) as pool:
        return list(track(pool.map(one, range(count)), description, count))


def _held_out(groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """True for about a fifth of the texts, in whole groups if there are enough groups, (n,)."""
    if groups.max() < HELD_OUT:
        groups = np.arange(len(groups))
    rank = rng.permutation(int(groups.max()) + 1)[groups]
    is_held: NDArray[np.bool_] = rank <= np.sort(rank)[len(rank) // HELD_OUT]
    return is_held if not is_held.all() else rank < rank.max()


def _mean_speedup(of: Recorded) -> float:
    """Mean speed-up of the risk signal, cross-fitted: each sample is scored by a risk that was fitted without it.

    The risk weighs no states, which would take most of the time.
    """
    of = replace(of, states=None)
    table = calibration.trade_off(Samples.independent(of), risk.fit(of), FINE_TAUS, risk.cross_fit(of))
    return calibration.mean_speedup(table)


def _chosen(
    texts: TrainingSet, held: TrainingSet, pooling: str, axes: Axes, layer: int
) -> tuple[float, Linear]:
    """The ridge with the smallest loss on held-out texts, and its classifier, fitted to `texts`."""
    y = held.pooled(pooling, layer)

    def loss(found: tuple[float, Linear]) -> float:
        logits = y @ found[1][0].T + found[1][1]
        if isinstance(held.target.kind, Value):
            return float(np.square(logits - held.target.outputs).mean())
        return _loss_of(held.target)(logits, held.target.probabilities)[0]

    ridges: Sequence[float] = VALUE_RIDGES if isinstance(texts.target.kind, Value) else RIDGES
    ridges = TOKEN_RIDGES if pooling == "none" else ridges
    return min(fitted(texts, pooling, layer, ridges, axes), key=loss)


def fitted(
    texts: TrainingSet,
    pooling: str,
    layer: int,
    ridges: Sequence[float],
    axes: Axes,
    start: Linear | None = None,
) -> Iterator[tuple[float, Linear]]:
    """Yield each ridge with its classifier, fitted to the target by cross-entropy or, for values, least squares.

    The ridge penalizes the weights of standardized states. start: classifier from which the fit starts; None: one that
    gives every text the mean probabilities.
    """
    x = texts.pooled(pooling, layer)
    mean, spread = x.mean(0), x.std(0) + 1e-4
    x = (x - mean) / spread
    if isinstance(texts.target.kind, Value):
        path = _values(x, texts.target.outputs.astype(np.float32), ridges)
    else:
        if len(x) < ENOUGH * x.shape[1]:
            basis = _principal_axes(x)
        else:
            basis = axes.get((pooling, layer)) or _principal_axes(x)
            axes[pooling, layer] = basis
        first = None if start is None else (start[0] * spread, start[1] + start[0] @ mean)
        path = _probabilities(x, texts.target, ridges, basis, first)
    for ridge, (weight, bias) in zip(ridges, path, strict=True):
        scaled = weight / spread
        yield ridge, (scaled, np.asarray(bias - scaled @ mean, np.float32))


def _principal_axes(x: Array) -> Basis:
    """The principal axes of standardized states (n, hidden); with fewer texts than dimensions, those that they span."""
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh((x.T @ x / len(x)).astype(np.float64))
        return np.maximum(values, 0), vectors
    values, vectors = np.linalg.eigh((x @ x.T / len(x)).astype(np.float64))
    spanned = values > 1e-6 * values[-1]
    values, vectors = values[spanned], vectors[:, spanned]
    return values, x.T @ vectors / np.sqrt(len(x) * values)


def _values(x: Array, wanted: Array, ridges: Sequence[float]) -> Iterator[Linear]:
    """Ridge regressions of values (n, 1) on states (n, hidden), one per ridge."""
    mean = wanted.mean(0)
    moments, products = x.T @ x / len(x), x.T @ (wanted - mean) / len(x)
    for ridge in ridges:
        yield np.linalg.solve(moments + ridge * np.eye(len(moments)), products).T.astype(np.float32), mean


def _loss_of(target: Target) -> Loss:
    return _sigmoid_loss if isinstance(target.kind, Labels) else _softmax_loss


def _softmax_loss(logits: Array, wanted: Array) -> tuple[float, Array]:
    """Mean cross-entropy of mutually exclusive classes. The gradient overwrites the logits."""
    count = len(logits)
    logits -= logits.max(-1, keepdims=True)
    hit = float(np.vdot(wanted, logits))
    odds = np.exp(logits, out=logits)
    total = odds.sum(-1, keepdims=True)
    value = (float(np.log(total).sum(dtype=np.float64)) - hit) / count
    odds /= total
    odds -= wanted
    odds /= count
    return value, odds


def _sigmoid_loss(logits: Array, wanted: Array) -> tuple[float, Array]:
    """Binary cross-entropy of a multi-label model, summed over labels, averaged over texts."""
    value = float((np.logaddexp(0, logits) - wanted * logits).sum(-1).mean())
    gradient: Array = ((sigmoid(logits) - wanted) / len(logits)).astype(np.float32)
    return value, gradient


def _probabilities(
    x: Array,
    target: Target,
    ridges: Sequence[float],
    basis: Basis,
    start: Linear | None,
) -> Iterator[Linear]:
    """Logistic regressions of probabilities (n, K) on states (n, hidden), one per ridge, by L-BFGS.

    Each starts at the previous solution. L-BFGS works in coordinates in which the loss has about equal curvature in
    all directions, and so needs a third of the steps.

    basis: the principal axes of the states. The weights stay in their span: outside of it, the best weights are 0.
    start: where the first one starts; None: weights of 0, and the bias that gives the mean probabilities.
    """
    from scipy.optimize import minimize

    wanted, loss, (variances, directions) = target.probabilities, _loss_of(target), basis
    tolerance = TOLERANCE if target.labels is None else LABEL_TOLERANCE
    count, rank = wanted.shape[1], len(variances)
    weight, bias = start or (
        np.zeros((count, x.shape[1]), np.float32),
        np.log(np.maximum(wanted.mean(0), 1e-6)),
    )
    for ridge in ridges:
        curvature = np.sqrt(CURVATURE * variances + 2 * ridge)
        to = (directions / curvature).astype(np.float32)
        seen, logits = x @ to, np.empty(wanted.shape, np.float32)

        def split(flat: NDArray[np.float64], to: Array = to) -> tuple[Array, Array, Array]:
            """Weights in the new coordinates, weights in the original ones, and bias."""
            both = flat.astype(np.float32)
            inside = both[: count * rank].reshape(count, rank)
            return inside, inside @ to.T, both[count * rank :]

        def objective(
            flat: NDArray[np.float64],
            ridge: float = ridge,
            to: Array = to,
            seen: Array = seen,
            logits: Array = logits,
        ) -> tuple[float, NDArray[np.float64]]:
            inside, weight, bias = split(flat)
            np.matmul(seen, inside.T, out=logits)  # new arrays of this size would take a third of the time
            logits += bias
            value, gradient = loss(logits, wanted)
            slopes = gradient.T @ seen + 2 * ridge * weight @ to
            total = value + ridge * float(np.square(weight).sum())
            return total, np.concatenate([slopes.ravel(), gradient.sum(0)]).astype(np.float64)

        flat_start = np.concatenate([(weight @ directions * curvature).ravel(), bias])
        options = {"maxiter": STEPS, "maxcor": 10, "ftol": tolerance}
        _, weight, bias = split(
            minimize(objective, flat_start, method="L-BFGS-B", jac=True, options=options).x
        )
        yield weight, bias


def with_spaces(exits: Exits, train: TrainingSet, seed: int, is_quiet: bool = False) -> Exits:
    """Add prototypical networks and prototypes, fitted to the target's answers, if a text has one class."""
    target = train.target
    if not isinstance(target.kind, Classes) or exits.pooling == "none":
        return exits

    def one(layer: int) -> tuple[Linear, Array]:
        weights = exits.classifiers[layer][0]
        states, answers = _with_every_class(train.pooled(exits.pooling, layer), target.answers, weights)
        space = _space(states, answers, len(weights), seed)
        means = np.stack([states[answers == k].mean(0) for k in range(len(weights))])
        return space, means @ space[0].T + space[1]  # the class's mean h', as h' is affine in the states

    both = in_parallel(one, exits.num_layers, "" if is_quiet else "Fitting prototypes")
    return replace(exits, spaces=[space for space, _ in both], prototypes=[rows for _, rows in both])


def _with_every_class(
    states: Array, answers: NDArray[np.generic], weights: Array
) -> tuple[Array, NDArray[np.int64]]:
    """Add a state for each class that is never the answer: the mean state, moved along the class's weights."""
    absent = sorted(set(range(len(weights))) - set(answers.tolist()))
    mean = states.mean(0)
    spread = np.linalg.norm(states - mean, axis=-1).mean()
    made = mean + spread * _unit(weights[absent])
    return np.concatenate([states, made]), np.concatenate([answers, absent]).astype(np.int64)


def _space(states: Array, answers: NDArray[np.int64], count: int, seed: int) -> Linear:
    """Train a prototypical network by L_DAR (Eq. 2) for one epoch, with moving-average prototypes (Eq. 1)."""
    rng, width = np.random.default_rng(seed), states.shape[1]
    network = [rng.normal(0, 0.02, (width, width)).astype(np.float32), np.zeros(width, np.float32)]
    moments = [(np.zeros_like(part), np.zeros_like(part)) for part in network]
    prototypes, seen = np.zeros((count, width), np.float32), np.zeros(count, np.bool_)
    batches = np.array_split(rng.permutation(len(states)), -(-len(states) // BATCH))
    for step, rows in enumerate(batches):
        x, own = states[rows], answers[rows]
        h = x @ network[0].T + network[1]
        for k in np.unique(own):
            mean = h[own == k].mean(0)
            prototypes[k] = (1 - GAMMA) * prototypes[k] + GAMMA * mean if seen[k] else mean
            seen[k] = True
        unit, target = _unit(h), _unit(prototypes[own])
        slope = (unit * (unit * target).sum(-1, keepdims=True) - target) / len(rows)
        slope /= np.linalg.norm(h, axis=-1, keepdims=True)
        for part, both, gradient in zip(network, moments, (slope.T @ x, slope.sum(0)), strict=True):
            _adam(part, both, gradient, step + 1, LR * (1 - step / len(batches)))
    return network[0], network[1]


def _adam(part: Array, moments: tuple[Array, Array], gradient: Array, step: int, rate: float) -> None:
    """Take one AdamW step in place. step: its number, from 1. moments: running means of the gradient and its square."""
    mean, square = moments
    # The only new array: on weights as large as these, allocating one per operation would take a third of the time.
    change = gradient - mean
    change *= 1 - BETAS[0]
    mean += change
    np.square(gradient, out=change)
    change -= square
    change *= 1 - BETAS[1]
    square += change
    np.sqrt(square, out=change)
    change *= (1 - BETAS[1] ** step) ** -0.5
    change += 1e-8
    np.divide(mean, change, out=change)
    change *= rate / (1 - BETAS[0] ** step)
    part *= 1 - rate * DECAY
    part -= change


def _unit(rows: Array) -> Array:
    lengths: Array = np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return rows / lengths
