"""Exit signals side by side, on the same recorded exits.

    python -m lab experiment signals DATA RUNS mrpc-minilm-D-0 mrpc-minilm-D-1 mrpc-minilm-D-2
    python -m lab experiment signals --redraw

Measures accuracy on unseen samples at fixed speed-ups in layers. Parameters (EDR's λ, energy's T, CAP's α) are chosen
for each speed-up on held-out samples; τ follows from the speed-up. Cells of a task that differ in seed are averaged
text by text; those that differ in fold are joined.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.experiments import measures
from lab.experiments.cells import Cell, States, Trained, grouped
from lab.experiments.command import command
from lab.experiments.measures import SPEEDUPS, Floats, markdown, number, right_at
from lab.experiments.scores import Family, families

NAME = "signals"


def of_cell(trained: Trained, first: int) -> dict[str, dict[str, Floats]]:
    """The correctness of each unseen text by signal and speed-up, (n,).

    A signal without a parameter also has its mean AUROC, (1,), as "auroc". Full depth's correctness has the keys
    "full depth" and "1". first: number of exits to omit at the start.
    """
    held, unseen = (trained.states(part).without(first) for part in ("held-out", "unseen"))
    # With 12 layers, recording the training samples would take long, and only learned exits need them.
    train = trained.states("train").without(first) if trained.cell.encoder == "minilm" else None
    found = {"full depth": {"1": unseen.recorded.correct[:, -1].astype(float)}}
    for family in families(trained.model, train, held, first):
        found[family.name] = {f"{s:g}": chosen(family, held, unseen, s)[1] for s in SPEEDUPS}
        score = next(iter(family.choices.values()))
        if len(family.choices) == 1:
            area = measures.mean_auroc(score(unseen), unseen.recorded)
            found[family.name]["auroc"] = np.array([area])
    return found


def chosen(family: Family, held: States, unseen: States, speedup: float) -> tuple[str, Floats]:
    """The parameter that is best on held-out samples at a speed-up, and the correctness of unseen texts with it."""
    if len(family.choices) == 1:
        name = next(iter(family.choices))
    else:
        merits = {
            name: right_at(of(held), held.recorded, speedup).mean() for name, of in family.choices.items()
        }
        name = max(merits, key=lambda name: -1 if np.isnan(merits[name]) else merits[name])
    return name, right_at(family.choices[name](unseen), unseen.recorded, speedup)


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """A row for each task, encoder and recipe, with and without the exit on the embeddings."""
    rows = []
    for (task, encoder, recipe, is_folds), members in grouped(cells).items():
        for first in (0, 1):
            found = [of_cell(Trained(cell, root, runs), first) for cell in members]
            joined = {
                name: {
                    speed: (np.concatenate if is_folds else _mean)([f[name][speed] for f in found])
                    for speed in found[0][name]
                }
                for name in found[0]
            }
            row = {"task": task, "encoder": encoder, "recipe": recipe, "folds": is_folds}
            row |= {"cells": len(members), "embeddings": first == 0}
            rows.append(row | summary(joined))
            print(f"{task} {encoder} {recipe} {'with' if first == 0 else 'without'} layer 0", flush=True)
    return rows


def _mean(parts: Sequence[Floats]) -> Floats:
    return np.asarray(np.mean(parts, axis=0))


def summary(right: dict[str, dict[str, Floats]]) -> dict[str, Any]:
    """Accuracies, and differences with 95% paired-bootstrap intervals.

    The differences are of each signal from entropy, and of risk from its variants and EDR. Removes "full depth" from
    `right`.
    """
    full = right.pop("full depth")["1"]
    out: dict[str, Any] = {"n": len(full), "full": full.mean(), "signals": {}}
    pairs = [(name, "entropy") for name in right if name != "entropy"]
    pairs += [("risk", "risk without DR"), ("risk", "EDR"), ("risk", "entropy, calibrated")]
    for name, by_speed in right.items():
        out["signals"][name] = {speed: values.mean() for speed, values in by_speed.items()}
    out["differences"] = [
        {
            "signal": a,
            "minus": b,
            "speedup": float(speed),
            "mean": (difference := right[a][speed] - right[b][speed]).mean(),
            "interval": measures.bootstrap(difference),
        }
        for a, b in pairs
        for speed in (f"{s:g}" for s in SPEEDUPS)
    ]
    return out


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of signals by model, one for each speed-up and one of AUROC, with and without layer 0, as Markdown."""
    out = []
    for embeddings in (True, False):
        some = [row for row in rows if row["embeddings"] == embeddings]
        for speedup in (f"{s:g}" for s in SPEEDUPS):
            title = f"{speedup}×, {'with' if embeddings else 'without'} layer 0"
            columns = [title, *(model(row) for row in some)]
            names = list(dict.fromkeys(name for row in some for name in row["signals"]))
            lines = [["full depth", *(f"{100 * row['full']:.1f}" for row in some)]]
            lines += [[name, *(_cell(row, name, speedup) for row in some)] for name in names]
            out.append(markdown(columns, lines))
        columns = ["AUROC, exit unlike the last", *(model(row) for row in some)]
        names = [name for name in names if any("auroc" in row["signals"].get(name, {}) for row in some)]
        lines = [
            [name, *(number(row["signals"].get(name, {}).get("auroc")) for row in some)] for name in names
        ]
        out.append(markdown(columns, lines))
    return "\n".join(out)


def model(row: dict[str, Any]) -> str:
    """The name of a model in tables."""
    name = f"{row['task']} {row['encoder']}" + (f" {row['recipe']}" if row["recipe"] != "D" else "")
    return name + (f", {row['cells']} {'folds' if row['folds'] else 'seeds'}" if row["cells"] > 1 else "")


def _cell(row: dict[str, Any], name: str, speedup: str) -> str:
    """An accuracy in percent, with * if the 95% interval of its difference from entropy's excludes 0."""
    value = row["signals"].get(name, {}).get(speedup)
    if value is None:
        return "–"
    low, high = next(
        (
            d["interval"]
            for d in row["differences"]
            if (d["signal"], d["minus"], d["speedup"]) == (name, "entropy", float(speedup))
        ),
        (0, 0),
    )
    return f"{100 * value:.1f}" + ("*" if low > 0 or high < 0 else "")


main = command(NAME, measure, tables)
