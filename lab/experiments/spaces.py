"""Prototype spaces refitted on cached states, in seconds."""

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray

from de3.exits.recorded import Recorded
from de3.training import prototypes
from de3.training.model import De3Model
from lab.experiments.cells import States
from lab.experiments.measures import Floats

BATCH, LR = 64, 1e-3  # as training.prototypes.finish


class Spaces:
    """Prototypical networks and prototypes of all exits but the last."""

    def __init__(self, model: De3Model) -> None:
        self.model = model

    @classmethod
    def fit(cls, like: De3Model, train: States, dim: int | None = None, seed: int = 0) -> "Spaces":
        """Networks retrained with L_DAR, and class means of h', as at the end of `de3 train`; dim: width of h'."""
        model = _empty(like, dim)
        order = np.random.default_rng(seed).permutation(len(train.pooled))
        batches = np.array_split(order, -(-len(order) // BATCH))
        labels = torch.from_numpy(train.recorded.labels)
        pairs = ((torch.from_numpy(train.pooled[rows].astype(np.float32)), labels[rows]) for rows in batches)
        prototypes.fit(model, pairs, len(batches), LR, seed)
        return cls(model)

    @torch.no_grad()
    def embedded(self, states: States) -> NDArray[np.float32]:
        """h', (n, spaces, dim)."""
        return np.asarray(self.model.embed(torch.from_numpy(states.pooled.astype(np.float32))).numpy())

    @torch.no_grad()
    def recorded(self, states: States) -> Recorded:
        """The states' exits, with distances in these spaces."""
        r, distances = states.recorded, np.full_like(states.recorded.logits, np.nan)
        near = self.model.distances(torch.from_numpy(self.embedded(states))).numpy()
        distances[:, : near.shape[1]] = near
        return Recorded(r.exit_layers, r.logits, distances, r.labels, r.tokens)


def _empty(like: De3Model, dim: int | None) -> De3Model:
    """A model with the same exits; its encoder is never run."""
    config = deepcopy(like.config)
    config.encoder = {**config.encoder, "vocab_size": 2}
    config.metric_dim = dim or config.metric_dim
    return De3Model(config)


def class_means(train: States, of: States, centred: bool) -> Recorded:
    """The exits of states with distances of h itself to its class means over the training samples."""
    h = train.pooled[:, :-1].astype(np.float32)
    origin = h.mean(0) if centred else np.zeros(h.shape[1:], np.float32)
    labels = train.recorded.labels
    means = np.stack([h[labels == k].mean(0) for k in range(train.recorded.logits.shape[-1])]) - origin
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    x = of.pooled[:, :-1].astype(np.float32) - origin
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    r, distances = of.recorded, np.full_like(of.recorded.logits, np.nan)
    distances[:, :-1] = 1 - np.einsum("neh,keh->nek", x, means)
    return Recorded(r.exit_layers, r.logits, distances, r.labels, r.tokens)


def nearest_is_right(recorded: Recorded) -> Floats:
    """Accuracy of the nearest prototype by exit, (exits − 1,)."""
    nearest = recorded.distances[:, :-1].argmin(-1)
    return np.asarray((nearest == recorded.labels[:, None]).mean(0))
