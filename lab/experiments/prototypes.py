"""Prototypes and an exit's mistakes: α, γ, and ways to compute the final prototypes.

    python -m lab experiment prototypes DATA --task mrpc

Trains with α = 0 and α = 0.1, and with γ fixed and as max(γ, 1/n_k), where n_k counts the batches with class k so far.
Each model's prototypes are then the sliding averages (Eq. 1), the class means of h', those of the refitted networks,
and the class means of h. The measure is the gain of risk by the distance ratio on unseen data: in AUROC for "this exit
disagrees with full depth", the mean of the exits, and in merit as in lab.experiments.risk_features.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from de3.training import data, prototypes
from de3.training.checkpoint import quiet
from de3.training.model import De3Model
from de3.training.recipe import by_size
from de3.training.settings import PROTOTYPES, TrainSettings
from de3.training.split import split
from de3.training.trainer import train
from lab.experiments.cells import States, record
from lab.experiments.measures import auroc_by_exit, merit
from lab.experiments.recipes import read
from lab.experiments.risk_features import features
from lab.experiments.scores import by_exit
from lab.experiments.spaces import class_means
from lab.experiments.tasks import TASKS, minilm

RESULTS = Path("lab/docs/experiments/prototypes.jsonl")
CELLS = {"α 0.1, γ 0.01": (0.1, False), "α 0.1, γ max(0.01, 1/n)": (0.1, True), "α 0": (0.0, True)}


class WarmModel(De3Model):
    """A model with γ = max(γ, 1/n_k): the plain mean of a class's batches, up to 1/γ of them."""

    @torch.no_grad()
    def update_prototypes(self, embedded: Tensor, labels: Tensor) -> None:
        """One step, with a factor for each class."""
        self.batches = getattr(self, "batches", Counter[int]())
        for k in labels.unique().tolist():
            self.batches[k] += 1
            gamma = max(self.config.gamma, 1 / self.batches[k])
            mean = embedded[labels == k].mean(0)
            self.prototypes[:, k] += gamma * (mean - self.prototypes[:, k])
            self.prototype_seen[:, k] = True


def measure(root: Path, task: str, cell: str, seed: int) -> Iterator[dict[str, Any]]:
    """Train one cell, and measure each kind of prototypes."""
    from transformers import AutoConfig, AutoTokenizer

    alpha, warm = CELLS[cell]
    rows, unseen = TASKS[task].train(root), TASKS[task].unseen(root)
    names = data.label_order(rows)
    parts = split(data.to_examples(rows, names), 0)
    recipe = by_size(len(parts.train))
    settings = TrainSettings(
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        epochs=recipe.epochs,
        alpha=alpha,
        seed=seed,
        prototypes="sliding",
    )
    torch.manual_seed(seed)
    encoder = minilm()
    tokenizer, layers = (
        AutoTokenizer.from_pretrained(encoder),
        AutoConfig.from_pretrained(encoder).num_hidden_layers,
    )
    kind = WarmModel if warm else De3Model
    model = kind.from_encoder(
        encoder, names, exit_layers=list(range(layers + 1)), input=data.input_of(parts.train)
    )
    with tempfile.TemporaryDirectory() as folder:
        model = train(model, tokenizer, parts, settings, Path(folder))
    model.eval()
    pad_id = tokenizer.pad_token_id
    encoded = {
        what: data.encode(examples, tokenizer, model.config.max_tokens, what)
        for what, examples in (
            ("train", parts.train),
            ("held-out", parts.tune + parts.certify),
            ("unseen", data.to_examples(unseen, names)),
        )
    }
    trained = record(model, encoded["train"], pad_id, "train")
    for how in PROTOTYPES[::-1]:  # the refit replaces the networks: last
        prototypes.finish(model, encoded["train"], pad_id, how, settings.head_lr, seed, settings.bf16)
        model.eval()
        states = [record(model, encoded[what], pad_id, what) for what in ("held-out", "unseen")]
        yield {"prototypes": how, **gain(*states)}
    for name, centred in (("class means of h", False), ("centred class means of h", True)):
        means = [replace(part, recorded=class_means(trained, part, centred)) for part in states]
        yield {"prototypes": name, **gain(*means)}


def gain(held: States, test: States) -> dict[str, Any]:
    """The gain of risk by the distance ratio, fitted on held-out samples: in AUROC by exit, and in merit."""
    without = by_exit(held, lambda s: features(s)[..., :4])(test)
    with_it = by_exit(held, features)(test)
    areas = [np.array(auroc_by_exit(scores, test.recorded)) for scores in (with_it, without)]
    return {
        "auroc": np.nanmean(areas[0]),
        "gain": (areas[0] - areas[1]).tolist(),
        "merit": merit(with_it, test.recorded),
        "merit_without": merit(without, test.recorded),
    }


def main(
    root: Annotated[Path | None, typer.Argument(help="Folder of the data sets.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of heads and order; the split stays.")] = 0,
    results: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of the results.")] = False,
) -> None:
    """Train with several prototype spaces, and print the gain of risk by the distance ratio of each."""
    quiet()
    done = read(results)
    for name in () if table else task or ["mrpc"]:
        if root is None:
            raise typer.BadParameter("give the folder of the data sets")
        for cell in CELLS:
            key = {"task": name, "training": cell, "seed": seed}
            if not any(key.items() <= row.items() for row in done):
                rows = [{**key, **row} for row in measure(root, name, cell, seed)]
                results.parent.mkdir(parents=True, exist_ok=True)
                with results.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    Console().print(report(results))


def report(results: Path) -> Table:
    """The gain in AUROC and in merit by task, training and prototypes."""
    table = Table(title="Gain of risk by the distance ratio, on unseen data")
    for column in ("task", "training", "prototypes", "AUROC gain, mean", "by exit", "merit", "without"):
        table.add_column(column, justify="right" if column[0] in "Amw" else "left")
    for row in read(results):
        by_exit = " ".join(f"{1000 * x:+.0f}" for x in row["gain"])
        mean = f"{np.nanmean(row['gain']):+.4f}"
        cells = (row["task"], row["training"], row["prototypes"], mean, f"{by_exit} ‰")
        table.add_row(*cells, f"{row['merit']:.2f}", f"{row['merit_without']:.2f}")
    return table
