"""The fits of exits: optima, the choice of ridges, prototypes and AdamW, compared with their definitions."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from de3.exits.kinds import kind_of_text
from de3.export import fit
from de3.export.fit import Exits
from de3.export.training_set import Target, TrainingSet

KINDS = ["classes", "labels", "values"]


def texts_of(kind: str, count: int, width: int = 12, noise: float = 1.0) -> TrainingSet:
    """Random states of one layer, and logits that depend on some of them."""
    rng, labels = np.random.default_rng(count), 1 if kind == "values" else 3
    states = (rng.normal(size=(count, 1, width)) * rng.uniform(0.5, 3, width) + 1).astype(np.float16)
    logits = states[:, 0, :labels] * 2 - 1 + noise * rng.normal(size=(count, labels))
    thresholds = [0.5, 0.6, 0.4] if kind == "labels" else None
    return TrainingSet(
        Target(logits.astype(np.float32), kind_of_text(thresholds, 0.5 if kind == "values" else None)),
        np.arange(count),
        lambda _, layer: states[:, layer],
    )


def loss(kind: str, logits: np.ndarray, of: TrainingSet) -> float:
    """Cross-entropy or squared error against full depth, by the definitions."""
    wanted = of.target.logits.astype(np.float64)
    if kind == "values":
        return float(((logits - wanted) ** 2).mean())
    if kind == "labels":
        p = 1 / (1 + np.exp(-wanted))
        return float((-p * np.log(q := 1 / (1 + np.exp(-logits))) - (1 - p) * np.log(1 - q)).sum(1).mean())
    p = np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True)
    return float(-(p * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [9, 200])  # with fewer texts than dimensions, and with many
def test_a_fit_is_the_minimum_of_its_penalized_loss(kind: str, count: int) -> None:
    texts, ridges = texts_of(kind, count), (0.1, 0.01)
    x = texts.pooled("mean", 0).astype(np.float64)
    spread = x.std(0) + 1e-4

    def objective(weight: np.ndarray, bias: np.ndarray, ridge: float) -> float:
        penalty = ridge * float(((weight * spread) ** 2).sum())
        return loss(kind, x @ weight.T + bias, texts) + penalty

    rng = np.random.default_rng(1)
    far = (rng.normal(size=(texts.target.logits.shape[1], 12)), rng.normal(size=texts.target.logits.shape[1]))
    starts: list[Any] = [None, tuple(part.astype(np.float32) for part in far)]
    for start in starts[: 1 if count == 9 else 2]:
        fits = list(fit.fitted(texts, "mean", 0, ridges, {}, start))
        assert [ridge for ridge, _ in fits] == list(ridges)
        for ridge, (weight, bias) in fits:
            best = objective(weight, bias, ridge)
            for _ in range(20):
                step = rng.normal(size=weight.shape) * 0.02 / spread
                shift = rng.normal(size=bias.shape) * 0.02
                assert best <= objective(weight + step, bias + shift, ridge) + 2e-5


class Watched(TrainingSet):
    """Remembers the parts that are made of it."""

    def part(self, rows: NDArray[np.int64]) -> TrainingSet:
        PARTS.append(super().part(rows))
        return PARTS[-1]


PARTS: list[TrainingSet] = []


@pytest.mark.parametrize("kind", KINDS)
def test_the_ridge_has_the_smallest_loss_on_a_fifth_of_the_texts_in_whole_groups(kind: str) -> None:
    whole = texts_of(kind, 100, noise=3.0)
    for copies in (1, 4):
        PARTS.clear()
        texts = Watched(whole.target, np.arange(100) // copies, whole.states)
        _, (ridge,), ((weight, bias),) = fit.choose(1, texts, 0, {}, ("mean",))
        held, others = PARTS
        assert 20 <= len(held) < 26 and len(held) + len(others) == 100
        assert not set(held.groups.tolist()) & set(others.groups.tolist())
        y, ridges = held.pooled("mean", 0), fit.VALUE_RIDGES if kind == "values" else fit.RIDGES
        losses = {r: loss(kind, y @ w.T + b, held) for r, (w, b) in fit.fitted(others, "mean", 0, ridges, {})}
        assert ridge == min(losses, key=lambda r: losses[r])
        assert loss(kind, y @ weight.T + bias, held) == pytest.approx(losses[ridge], rel=1e-4)


def test_prototypes_are_the_class_means_in_their_space_and_distances_are_cosine() -> None:
    texts = texts_of("classes", 80)
    classifier = next(fit.fitted(texts, "mean", 0, (0.1,), {}))[1]
    exits = fit.with_spaces(Exits("mean", [classifier], [], []), texts, 0)
    x, ((weight, bias),) = texts.pooled("mean", 0), exits.spaces
    h = x @ weight.T + bias
    means = np.stack([h[texts.target.answers == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(exits.prototypes[0], means, rtol=1e-3, atol=1e-5)
    found = exits.recorded(texts)
    norms = np.linalg.norm(h, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    np.testing.assert_allclose(found.distances[:, 0], 1 - h @ means.T / norms, atol=1e-4)
    assert np.isnan(found.distances[:, 1]).all() and (found.logits[:, 1] == texts.target.logits).all()
    for kind in ("labels", "values"):  # which have no prototypes
        plain = Exits("mean", exits.classifiers, [], [])
        assert fit.with_spaces(plain, texts_of(kind, 20), 0).prototypes == []


def test_a_class_that_is_never_the_answer_gets_a_prototype_along_its_weights() -> None:
    texts = texts_of("classes", 80)
    assert texts.target.logits is not None
    texts.target.logits[:, 1] = -9
    weights, x = np.eye(3, 12, dtype=np.float32) * 5, texts.pooled("mean", 0)
    exits = fit.with_spaces(Exits("mean", [(weights, np.zeros(3, np.float32))], [], []), texts, 0)
    (weight, bias), mean = exits.spaces[0], x.mean(0)
    made = mean + np.linalg.norm(x - mean, axis=1).mean() * np.eye(12)[1]
    np.testing.assert_allclose(exits.prototypes[0][1], weight @ made + bias, rtol=1e-3, atol=1e-5)


def test_a_prototypical_network_is_trained_by_the_equations_and_adamw_for_one_epoch() -> None:
    texts = texts_of("classes", 300, width=3)
    states, answers = texts.pooled("mean", 0), texts.target.answers
    classifier = (np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
    ((weight, bias),) = fit.with_spaces(Exits("mean", [classifier], [], []), texts, 5).spaces
    rng = np.random.default_rng(5)
    theta, m, v, prototypes = np.append(rng.normal(0, 0.02, (3, 3)), np.zeros(3)), 0.0, 0.0, np.zeros((3, 3))
    for step, rows in enumerate(np.array_split(rng.permutation(300), 5)):
        own = answers[rows]

        def hidden(theta: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            return np.asarray(states[rows] @ theta[:9].reshape(3, 3).T + theta[9:])

        means = np.stack([hidden(theta)[own == k].mean(0) for k in range(3)])
        prototypes = means if step == 0 else 0.99 * prototypes + 0.01 * means  # Eq. 1

        def distance(theta: np.ndarray, target: np.ndarray = prototypes[own], hidden: Any = hidden) -> float:
            h = hidden(theta)
            norms = np.linalg.norm(h, axis=1) * np.linalg.norm(target, axis=1)
            return float((1 - (h * target).sum(1) / norms).mean())  # Eq. 2

        steps = 1e-6 * np.eye(12)
        gradient = np.array([(distance(theta + e) - distance(theta - e)) / 2e-6 for e in steps])
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 1e-3 * (1 - step / 5)
        change = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        theta = theta * (1 - rate * 0.01) - rate * change
    np.testing.assert_allclose(np.append(weight, bias), theta, atol=5e-6)
