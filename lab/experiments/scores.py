"""Exit signals, ours and published ones: scores of recorded exits, (n, exits), small if the exit is certain.

The scores of the last exit are unused.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from de3.exits import formulas
from de3.exits.risk import regress
from de3.training.model import De3Model
from lab.experiments.cells import States

Floats = NDArray[np.float64]
Score = Callable[[States], Floats]
LAMS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 100.0)
ENERGY_TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
CAP_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Family(NamedTuple):
    """A signal at each value of its parameter; the value is chosen on held-out samples."""

    name: str
    choices: dict[str, Score]


def families(model: De3Model, train: States | None, held: States, first: int = 0) -> list[Family]:
    """All signals, fitted on held-out samples where necessary (learned exits: on training samples).

    train: None: leave out the learned exits. first: number of exits at the start of the model that the states lack.
    """
    out = [
        Family("entropy", {"": lambda s: s.recorded.entropy}),
        Family("probability", {"": lambda s: 1 - formulas.softmax(s.recorded.logits).max(-1)}),
        Family("patience", {"": patience}),
        Family("energy", {f"T={t:g}": partial(energy, temperature=t) for t in ENERGY_TEMPERATURES}),
        Family("CAP", {f"α={a:g}": partial(cap, model, first=first, scale=a) for a in CAP_SCALES}),
        Family("distance ratio", {"": lambda s: s.recorded.distance_ratio}),
        Family("EDR", {f"λ={lam:g}": partial(edr, lam=lam) for lam in LAMS}),
        Family(
            "entropy, calibrated", {"": by_exit(held, lambda s: s.recorded.risk_features[..., [0, 2, 3]])}
        ),
        Family("risk without DR", {"": by_exit(held, lambda s: s.recorded.risk_features[..., :4])}),
        Family("risk", {"": by_exit(held, lambda s: s.recorded.risk_features)}),
    ]
    if train is not None:
        out.insert(5, Family("learned exits", {"": learned(train)}))
    return out


def edr(states: States, lam: float) -> Floats:
    """The paper's EDR (Eq. 12); NaN at the last exit, which has no prototypes."""
    return formulas.edr(states.recorded.entropy, states.recorded.distance_ratio, lam)


def patience(states: States) -> Floats:
    """PABEE's patience: 1/(1 + number of exits in a row before this one with the same answer)."""
    answers = states.recorded.answers
    streak = np.zeros(answers.shape)
    for j in range(1, answers.shape[1]):
        streak[:, j] = np.where(answers[:, j] == answers[:, j - 1], streak[:, j - 1] + 1, 0)
    return np.asarray(1 / (1 + streak))


def energy(states: States, temperature: float) -> Floats:
    """COSEE's normalized energy: 1/(1 + (Σ exp(logit/T))^T)."""
    x = states.recorded.logits.astype(np.float64) / temperature
    highest = x.max(-1)
    log_sum = highest + np.log(np.exp(x - highest[..., None]).sum(-1))
    return np.asarray(1 / (1 + np.exp(np.clip(temperature * log_sum, -700, 700))))


def cap(model: De3Model, states: States, scale: float, first: int) -> Floats:
    """CAP: last entry of softmax(logits, scale·NSP); NSP is the share of h outside the classifier's row space.

    With W (K, hidden) and b: x = h + pinv(W)·b, NSP = √(1 − ‖P x‖²/‖x‖²), P the projection onto the row space of W.
    """
    scores: Floats = np.ones(states.recorded.logits.shape[:2])
    for j in range(scores.shape[1]):
        classifier = model.classifiers[first + j]
        w, b = (p.detach().numpy().astype(np.float64) for p in classifier.parameters())
        x = states.pooled[:, j].astype(np.float64) + np.linalg.pinv(w) @ b
        basis = np.linalg.qr(w.T)[0]  # (hidden, K)
        seen = ((x @ basis) ** 2).sum(-1) / (x**2).sum(-1)
        nsp = np.sqrt(np.clip(1 - seen, 0, 1))
        logits = np.concatenate([states.recorded.logits[:, j], scale * nsp[:, None]], -1)
        scores[:, j] = formulas.softmax(logits)[:, -1]
    return scores


def by_exit(held: States, features: Callable[[States], Floats]) -> Score:
    """A score: the probability of "differs from full depth", by a logistic regression for each exit.

    The regression is fitted on held-out samples. features: returns (n, exits, features); the first feature is 1.
    """
    x, y = features(held), held.recorded.differs.astype(np.float64)
    weights = [regress(x[:, j], y[:, j]) for j in range(x.shape[1] - 1)]

    def score(states: States) -> Floats:
        z = np.stack([features(states)[:, j] @ w for j, w in enumerate(weights)], 1)
        return np.concatenate([1 / (1 + np.exp(-np.clip(z, -700, 700))), np.ones((len(z), 1))], 1)

    return score


def learned(train: States, rows: int = 20_000, steps: int = 300) -> Score:
    """BERxiT's learned exits: one linear map of h for all exits, fitted on training samples to predict correctness."""
    keep = np.random.default_rng(0).permutation(len(train.pooled))[:rows]
    x = torch.from_numpy(train.pooled[keep, :-1].astype(np.float32))
    y = torch.from_numpy(train.recorded.correct[keep, :-1].astype(np.float32))
    torch.manual_seed(0)
    layer = torch.nn.Linear(x.shape[-1], 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (256,))
        loss = (torch.sigmoid(layer(x[batch]).squeeze(-1)) - y[batch]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def score(states: States) -> Floats:
        sure = torch.sigmoid(layer(torch.from_numpy(states.pooled.astype(np.float32))).squeeze(-1))
        return np.asarray(1 - sure.numpy().astype(np.float64))

    return score
