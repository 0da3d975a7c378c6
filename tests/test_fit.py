"""The fits of exits: optima, the choice of ridges, prototypes and AdamW, compared with their definitions."""

from typing import Any

import numpy as np
import pytest

from de3.export import fit
from de3.export.fit import Exits
from de3.export.training_set import Target, TrainingSet

KINDS = ["classes", "labels", "values"]


def texts_of(kind: str, count: int, width: int = 12, noise: float = 1.0) -> TrainingSet:
    """Random states of one layer, and logits that depend on some of them."""
    rng, labels = np.random.default_rng(count), 1 if kind == "values" else 3
    states = (rng.normal(size=(count, 1, width)) * rng.uniform(0.5, 3, width) + 1).astype(np.float16)
    logits = states[:, 0, :labels] * 2 - 1 + noise * rng.normal(size=(count, labels))
    thresholds = np.array([0.0, 0.5, -0.5]) if kind == "labels" else None
    tolerance = 0.5 if kind == "values" else None
    return TrainingSet(
        Target(logits.astype(np.float32), thresholds, tolerance),
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_ridge_has_the_smallest_loss_on_held_out_texts(kind: str) -> None:
    texts, held = texts_of(kind, 60, noise=3.0), texts_of(kind, 200, noise=3.0)
    ridges = fit.VALUE_RIDGES if kind == "values" else fit.RIDGES
    y = held.pooled("mean", 0)
    losses = {r: loss(kind, y @ w.T + b, held) for r, (w, b) in fit.fitted(texts, "mean", 0, ridges, {})}
    ridge, (weight, bias) = fit._chosen(texts, held, "mean", {}, 0)
    assert ridge == min(losses, key=lambda r: losses[r])
    assert loss(kind, y @ weight.T + bias, held) == pytest.approx(losses[ridge], rel=1e-4)


def test_about_a_fifth_of_the_texts_is_held_out_in_whole_groups() -> None:
    for copies in (1, 4):
        groups = np.arange(400) // copies
        is_held = fit._held_out(groups, np.random.default_rng(0))
        assert 0.2 <= is_held.mean() < 0.23
        assert len({(group, held) for group, held in zip(groups, is_held, strict=True)}) == 400 // copies


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
    states = np.random.default_rng(2).normal(size=(30, 4)).astype(np.float32)
    weights = np.eye(3, 4, dtype=np.float32) * 5
    found, answers = fit._with_every_class(states, np.arange(30) % 2 * 2, weights)
    assert answers.tolist() == [*(np.arange(30) % 2 * 2).tolist(), 1]
    mean = states.mean(0)
    spread = np.linalg.norm(states - mean, axis=1).mean()
    np.testing.assert_allclose(found[30], mean + spread * np.eye(4)[1], rtol=1e-5, atol=1e-6)


def test_adam_takes_the_steps_of_adamw() -> None:
    rng = np.random.default_rng(3)
    part = rng.normal(size=(3, 4)).astype(np.float32)
    moments = np.zeros_like(part), np.zeros_like(part)
    expected, m, v = part.astype(np.float64), np.zeros((3, 4)), np.zeros((3, 4))
    for step in range(1, 6):
        gradient, rate = rng.normal(size=(3, 4)).astype(np.float32), 0.1 / step
        fit._adam(part, moments, gradient, step, rate)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        change = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        expected = expected * (1 - rate * 0.01) - rate * change
    np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)


def test_a_prototypical_network_is_trained_by_the_equations_for_one_epoch() -> None:
    states = np.random.default_rng(4).normal(size=(90, 3)).astype(np.float32)
    answers = np.arange(90) % 2
    weight, bias = fit._space(states, answers, 2, 5)
    rng = np.random.default_rng(5)
    theta, m, v, prototypes = np.append(rng.normal(0, 0.02, (3, 3)), np.zeros(3)), 0.0, 0.0, np.zeros((2, 3))
    for step, rows in enumerate(np.array_split(rng.permutation(90), 2)):
        own = answers[rows]

        def hidden(theta: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            return np.asarray(states[rows] @ theta[:9].reshape(3, 3).T + theta[9:])

        means = np.stack([hidden(theta)[own == k].mean(0) for k in (0, 1)])
        prototypes = means if step == 0 else 0.99 * prototypes + 0.01 * means  # Eq. 1

        def distance(theta: np.ndarray, target: np.ndarray = prototypes[own], hidden: Any = hidden) -> float:
            h = hidden(theta)
            norms = np.linalg.norm(h, axis=1) * np.linalg.norm(target, axis=1)
            return float((1 - (h * target).sum(1) / norms).mean())  # Eq. 2

        steps = 1e-6 * np.eye(12)
        gradient = np.array([(distance(theta + e) - distance(theta - e)) / 2e-6 for e in steps])
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 1e-3 * (1 - step / 2)
        change = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        theta = theta * (1 - rate * 0.01) - rate * change
    np.testing.assert_allclose(np.append(weight, bias), theta, atol=2e-6)
