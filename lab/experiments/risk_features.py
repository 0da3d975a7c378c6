"""Signals at equal disagreement with full depth, and features of risk, such as the geometry of the prototypes.

    python -m lab experiment risk_features DATA CHECKPOINT --task mrpc

Risks are fitted on the parts that training held out, and measured on the data set's own dev or test part. The merit is
the geometric mean of the speed-ups, in layers, at 1, 2 and 5% disagreement.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import isotonic_regression

from de3.exits import formulas
from de3.exits.calibration import LAMS, MERIT_AT
from de3.exits.recorded import Recorded
from de3.exits.risk import regress
from de3.exits.rule import exit_index
from de3.exits.signals import Edr
from de3.training import data
from de3.training.checkpoint import Checkpoint
from de3.training.data import Encoded, evaluation_batches
from de3.training.model import De3Model
from lab.experiments.measures import auroc
from lab.experiments.tasks import TASKS

Floats = NDArray[np.float64]
Features = Callable[["Samples"], Floats]


class Samples:
    """Recorded samples, with their pooled states h^(m) (n, exits, hidden) and their numbers of tokens (n,)."""

    def __init__(self, model: De3Model, pad_id: int, encoded: Encoded) -> None:
        """Run the model in float32."""
        n, exits = len(encoded), len(model.config.exit_layers)
        logits = np.zeros((n, exits, model.config.num_labels), np.float32)
        distances = np.full_like(logits, np.nan)
        self.states = np.zeros((n, exits, model.config.hidden_size), np.float32)
        with torch.no_grad():
            for rows in evaluation_batches([len(ids) for ids in encoded.ids], 64):
                inputs, _ = encoded.batch(rows, pad_id)
                pooled = model.pooled(**inputs)
                self.states[rows] = pooled.numpy()
                for j, classify in enumerate(model.classifiers):
                    logits[rows, j] = classify(pooled[:, j]).numpy()
                spaces = model.distances(model.embed(pooled))
                distances[rows, : spaces.shape[1]] = spaces.numpy()
        self.recorded = Recorded(model.config.exit_layers, logits, distances, encoded.labels.numpy())
        self.tokens = np.array([len(ids) for ids in encoded.ids])

    @property
    def differs(self) -> Floats:
        """1 where an exit's label is not that of full depth, (n, exits)."""
        labels = self.recorded.logits.argmax(-1)
        return np.asarray(labels != labels[:, -1:], np.float64)


def class_means(train: Samples, centred: bool) -> Callable[[Samples], Floats]:
    """Distances to the class means of h^(m) over the training samples, instead of to the prototypes of h'^(m)."""
    origin = train.states.mean(0) if centred else np.zeros(train.states.shape[1:], np.float32)
    labels = train.recorded.labels
    means = (
        np.stack([train.states[labels == k].mean(0) for k in range(train.recorded.logits.shape[-1])]) - origin
    )
    means /= np.linalg.norm(means, axis=-1, keepdims=True)

    def distances(samples: Samples) -> Floats:
        states = samples.states - origin
        states = states / np.linalg.norm(states, axis=-1, keepdims=True)
        return np.asarray(1 - np.einsum("neh,keh->nek", states, means), np.float64)

    return distances


def features(samples: Samples, distances: Floats | None = None) -> Floats:
    """The features of risk, (n, exits, 5); distances: instead of those to the prototypes."""
    used = samples.recorded.distances if distances is None else distances
    return formulas.risk_features(samples.recorded.logits, used)


def variants(train: Samples) -> dict[str, Features]:
    """Candidate features of risk, by name."""
    raw, centred = class_means(train, False), class_means(train, True)

    def also(extra: Callable[[Samples], Floats]) -> Features:
        return lambda s: np.concatenate([features(s), extra(s)[..., None]], -1)

    def agreement(s: Samples) -> Floats:
        labels = s.recorded.logits.argmax(-1)
        same = [
            (labels[:, :j] == labels[:, j : j + 1]).mean(1) if j else 0 * labels[:, 0]
            for j in range(labels.shape[1])
        ]
        return np.stack(same, 1).astype(np.float64)

    return {
        "risk without DR": lambda s: features(s)[..., :4],
        "risk, DR by prototypes": features,
        "risk, DR by class means of h": lambda s: features(s, raw(s)),
        "risk, DR by centred class means of h": lambda s: features(s, centred(s)),
        "risk, and agreement with earlier exits": also(agreement),
        "risk, and text length": also(lambda s: np.repeat(np.log(s.tokens)[:, None], s.states.shape[1], 1)),
        "risk, and the class": also(lambda s: (s.recorded.logits.argmax(-1) == 0).astype(np.float64)),
    }


def fitted(held_out: Samples, unseen: Samples, of: Features) -> Floats:
    """The scores of unseen samples, (n, exits), by a logistic regression on held-out samples."""
    x, y, z = of(held_out), held_out.differs, of(unseen)
    scores = [z[:, j] @ regress(x[:, j], y[:, j]) for j in range(x.shape[1] - 1)]
    return np.stack([*scores, np.full(len(z), np.inf)], 1)


def isotonic(held_out: Samples, unseen: Samples) -> Floats:
    """As `fitted`, with each exit's score then calibrated by an isotonic regression on the same samples."""
    x, y, z = features(held_out), held_out.differs, features(unseen)
    scores = []
    for j in range(x.shape[1] - 1):
        weights = regress(x[:, j], y[:, j])
        known = x[:, j] @ weights
        order = known.argsort()
        steps = isotonic_regression(y[order, j]).x
        # Ties are broken by the logistic score, or whole steps would exit at once.
        scores.append(np.interp(z[:, j] @ weights, known[order], steps + 1e-9 * known[order]))
    return np.stack([*scores, np.full(len(z), np.inf)], 1)


def shared(held_out: Samples, unseen: Samples, strength: float) -> Floats:
    """As `fitted`, with weights shrunk towards one regression for all exits, as if by `strength` samples."""
    x, y, z = features(held_out)[:, :-1], held_out.differs[:, :-1], features(unseen)[:, :-1]
    flat = x.reshape(-1, x.shape[-1])
    common = regress(flat, y.reshape(-1))
    answers = 1 / (1 + np.exp(-np.clip(flat @ common, -500, 500))).reshape(y.shape)
    share = strength / (strength + len(x))
    # Each target is mixed with the answer of the common regression.
    scores = [
        z[:, j] @ regress(x[:, j], (1 - share) * y[:, j] + share * answers[:, j]) for j in range(x.shape[1])
    ]
    return np.stack([*scores, np.full(len(z), np.inf)], 1)


def speeds(scores: Floats, samples: Samples) -> list[float]:
    """The highest speed-ups at 1, 2 and 5% disagreement, with the best τ in hindsight."""
    layers, rows = np.asarray(samples.recorded.exit_layers), np.arange(len(scores))
    finite = scores[:, :-1][np.isfinite(scores[:, :-1])]
    best = dict.fromkeys(MERIT_AT, 1.0)
    for tau in np.unique(np.quantile(finite, np.linspace(0, 1, 1000))):
        index = exit_index(scores, float(tau))
        rate, depth = samples.differs[rows, index].mean(), layers[index].mean()
        for limit in MERIT_AT:
            if rate <= limit:
                best[limit] = max(best[limit], float(layers[-1] / max(depth, 0.05)))
    return list(best.values())


def main(
    root: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    folder: Annotated[Path, typer.Argument(help="A checkpoint of de3 train, on the same data and seed.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
) -> None:
    """Compare signals and features of risk, on data that nothing was trained or fitted on."""
    checkpoint = Checkpoint(folder)

    def samples(examples: list[data.Example], what: str) -> Samples:
        encoded = data.encode(examples, checkpoint.tokenizer, checkpoint.config.max_tokens, what)
        return Samples(checkpoint.model, checkpoint.tokenizer.pad_token_id, encoded)

    held = checkpoint.held_out("tune") + checkpoint.held_out("certify")
    kept = {example.text for example in held}
    rows = data.to_examples(TASKS[task].train(root), checkpoint.names)
    train = samples([example for example in rows if example.text not in kept], "train")
    held_out = samples(held, "held-out")
    unseen = samples(data.to_examples(TASKS[task].unseen(root), checkpoint.names), "unseen")
    recorded = unseen.recorded
    scores: dict[str, Floats] = {"entropy": recorded.entropy}
    scores |= {f"EDR λ={lam:g}": Edr(lam).scores(recorded) for lam in LAMS}
    scores |= {name: fitted(held_out, unseen, of) for name, of in variants(train).items()}
    scores["risk, isotonic"] = isotonic(held_out, unseen)
    for strength in (50, 500):
        scores[f"risk, exits share {strength} samples"] = shared(held_out, unseen, strength)
    n, fits = len(recorded.labels), len(held)
    table = Table(title=f"{task}: speed-up at 1, 2 and 5% disagreement, {n} unseen samples, {fits} to fit on")
    for column in ("signal", "1%", "2%", "5%", "merit"):
        table.add_column(column, justify="left" if column == "signal" else "right")
    for name, values in scores.items():
        found = speeds(values, unseen)
        merit = float(np.exp(np.mean(np.log(found))))
        table.add_row(name, *(f"{speed:.2f}×" for speed in found), f"{merit:.2f}")
    console = Console()
    console.print(table)
    console.print('AUROC for "this exit disagrees with full depth", by layer:')
    for name in (
        "entropy",
        "EDR λ=1",
        "risk without DR",
        "risk, DR by prototypes",
        "risk, DR by class means of h",
    ):
        areas = [
            auroc(scores[name][:, j], unseen.differs[:, j]) for j in range(len(recorded.exit_layers) - 1)
        ]
        console.print(f"  {name}: {' '.join(f'{area:.3f}' for area in areas)}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
