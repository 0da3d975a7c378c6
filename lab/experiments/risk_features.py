"""Signals at equal disagreement with full depth, and features of risk, such as the geometry of the prototypes.

    python -m lab experiment risk_features DATA CHECKPOINT --task mrpc

Risks are fitted on the parts that training held out, and measured on the data set's own dev or test part. The merit is
the geometric mean of the speed-ups, in layers, at 1, 2 and 5% disagreement.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import isotonic_regression

from de3.exits.calibration import LAMS, MERIT_AT
from de3.exits.risk import regress
from de3.exits.signals import Edr
from de3.training import data
from de3.training.checkpoint import Checkpoint
from lab.experiments.cells import States, record
from lab.experiments.measures import Floats, auroc_by_exit, merit, speed_within
from lab.experiments.scores import by_exit
from lab.experiments.spaces import class_means
from lab.experiments.tasks import TASKS

Features = Callable[[States], Floats]


def features(states: States) -> Floats:
    """The features of risk, (n, exits, 5)."""
    return np.asarray(states.recorded.risk_features)


def variants(train: States) -> dict[str, Features]:
    """Candidate features of risk, by name."""

    def by_means(centred: bool) -> Features:
        return lambda s: np.asarray(class_means(train, s, centred).risk_features)

    def also(extra: Features) -> Features:
        return lambda s: np.concatenate([features(s), extra(s)[..., None]], -1)

    def agreement(s: States) -> Floats:
        labels = s.recorded.answers
        same = [
            (labels[:, :j] == labels[:, j : j + 1]).mean(1) if j else 0 * labels[:, 0]
            for j in range(labels.shape[1])
        ]
        return np.stack(same, 1).astype(np.float64)

    def length(s: States) -> Floats:
        return np.repeat(np.log(np.asarray(s.recorded.tokens))[:, None], s.pooled.shape[1], 1)

    return {
        "risk without DR": lambda s: features(s)[..., :4],
        "risk, DR by prototypes": features,
        "risk, DR by class means of h": by_means(False),
        "risk, DR by centred class means of h": by_means(True),
        "risk, and agreement with earlier exits": also(agreement),
        "risk, and text length": also(length),
        "risk, and the class": also(lambda s: (s.recorded.answers == 0).astype(np.float64)),
    }


def isotonic(held_out: States, unseen: States) -> Floats:
    """Risk with each exit's score calibrated by an isotonic regression on the samples that it is fitted on."""
    x, y, z = features(held_out), held_out.recorded.differs, features(unseen)
    scores = []
    for j in range(x.shape[1] - 1):
        weights = regress(x[:, j], y[:, j].astype(np.float64))
        known = x[:, j] @ weights
        order = known.argsort()
        steps = isotonic_regression(y[order, j]).x
        # Ties are broken by the logistic score, or whole steps would exit at once.
        scores.append(np.interp(z[:, j] @ weights, known[order], steps + 1e-9 * known[order]))
    return np.stack([*scores, np.full(len(z), np.inf)], 1)


def shared(held_out: States, unseen: States, strength: float) -> Floats:
    """Risk with weights shrunk towards one regression for all exits, as if by `strength` samples."""
    x, z = features(held_out)[:, :-1], features(unseen)[:, :-1]
    y = held_out.recorded.differs[:, :-1].astype(np.float64)
    flat = x.reshape(-1, x.shape[-1])
    common = regress(flat, y.reshape(-1))
    answers = 1 / (1 + np.exp(-np.clip(flat @ common, -500, 500))).reshape(y.shape)
    share = strength / (strength + len(x))
    # Each target is mixed with the answer of the common regression.
    scores = [
        z[:, j] @ regress(x[:, j], (1 - share) * y[:, j] + share * answers[:, j]) for j in range(x.shape[1])
    ]
    return np.stack([*scores, np.full(len(z), np.inf)], 1)


def main(
    root: Annotated[Path, typer.Argument(help="Folder of the data sets.")],
    folder: Annotated[Path, typer.Argument(help="A checkpoint of de3 train, on the same data and seed.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")],
) -> None:
    """Compare signals and features of risk, on data that nothing was trained or fitted on."""
    checkpoint = Checkpoint(folder)

    def states(examples: list[data.Example], what: str) -> States:
        encoded = data.encode(examples, checkpoint.tokenizer, checkpoint.config.max_tokens, what)
        return record(checkpoint.model, encoded, checkpoint.tokenizer.pad_token_id, what)

    held = checkpoint.held_out("tune") + checkpoint.held_out("certify")
    kept = {example.text for example in held}
    rows = data.to_examples(TASKS[task].train(root), checkpoint.names)
    train = states([example for example in rows if example.text not in kept], "train")
    held_out = states(held, "held-out")
    unseen = states(data.to_examples(TASKS[task].unseen(root), checkpoint.names), "unseen")
    recorded = unseen.recorded
    scores: dict[str, Floats] = {"entropy": recorded.entropy}
    scores |= {f"EDR λ={lam:g}": Edr(lam).scores(recorded) for lam in LAMS}
    scores |= {name: by_exit(held_out, of)(unseen) for name, of in variants(train).items()}
    scores["risk, isotonic"] = isotonic(held_out, unseen)
    for strength in (50, 500):
        scores[f"risk, exits share {strength} samples"] = shared(held_out, unseen, strength)
    n, fits = len(recorded.labels), len(held)
    table = Table(title=f"{task}: speed-up at 1, 2 and 5% disagreement, {n} unseen samples, {fits} to fit on")
    for column in ("signal", "1%", "2%", "5%", "merit"):
        table.add_column(column, justify="left" if column == "signal" else "right")
    for name, values in scores.items():
        found = [speed_within(values, recorded, disagreement) for disagreement in MERIT_AT]
        table.add_row(name, *(f"{speed:.2f}×" for speed in found), f"{merit(values, recorded):.2f}")
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
        areas = auroc_by_exit(scores[name], recorded)
        console.print(f"  {name}: {' '.join(f'{area:.3f}' for area in areas)}", highlight=False)
