"""Four recipes in a half-fraction of a factorial design: 8 of their 16 combinations, for all main effects.

    python -m lab experiment factorial DATA RUNS mrpc-minilm-D-0 cola-minilm-D-0
    python -m lab experiment factorial --redraw

T: a 12-layer teacher answers the training pairs and an altered copy of each. W: COSEE's exit-likely weights instead of
weights by depth. S: the last exit teaches the others. D: the paper's DAR. The combinations are those with an odd number
of letters (D = −TWS): each effect is the mean of four models less that of four others, and is confounded with one
interaction of the three others only. A cell names task, encoder and seed; a teacher is the cell TASK-mpnet-D-0.

The response is the accuracy on held-out and unseen samples together, at full depth and at fixed speed-ups, by risk,
cross-fitted on the same samples without labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from de3.exits import risk
from lab.experiments import measures
from lab.experiments.cells import Cell, Trained
from lab.experiments.command import command
from lab.experiments.measures import Floats, fastest_within, joined, markdown, merit, right_at

NAME = "factorial"
FACTORS = "TWSD"
DESIGN = ("D", "T", "W", "S", "TWS", "TWD", "TSD", "WSD")
SPEEDUPS = (1.0, 1.5, 2.0, 3.0, 4.0)


def of_cell(trained: Trained, first: int) -> dict[str, Floats]:
    """Each response by sample, (n,), or as one number; first: number of first exits to leave out."""
    recorded = joined([trained.states(part).without(first).recorded for part in ("held-out", "unseen")])
    scores = risk.cross_fit(recorded)
    found = {f"{s:g}×": right_at(scores, recorded, s) for s in SPEEDUPS[1:]}
    found = {"1×": recorded.correct[:, -1].astype(float), **found}
    found["merit"] = np.array([merit(scores, recorded)])
    found["within 0.5"] = np.array([fastest_within(scores, recorded, 0.005)])
    return found


def of_task(cell: Cell, root: Path, runs: Path) -> list[dict[str, Any]]:
    """Two rows, with and without the exit on the embeddings: the responses of each model, and the effects."""
    rows = []
    for first in (0, 1):
        found = {
            recipe: of_cell(Trained(replace(cell, recipe=recipe), root, runs), first) for recipe in DESIGN
        }
        rows.append(
            {
                "task": cell.task,
                "embeddings": first == 0,
                "n": len(found["D"]["1×"]),
                "models": {r: {name: values.mean() for name, values in f.items()} for r, f in found.items()},
                "effects": {f: effect(found, f) for f in FACTORS},
            }
        )
    return rows


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """The rows of each cell's task; the cell names task, encoder and seed of the design."""
    return [row for cell in cells for row in of_task(cell, root, runs)]


def effect(found: dict[str, dict[str, Floats]], factor: str) -> dict[str, Any]:
    """The effect of a factor on each response, with a 95% interval where the response is by sample."""
    out: dict[str, Any] = {}
    for name in found["D"]:
        with_it, without = (
            np.mean([f[name] for recipe, f in found.items() if (factor in recipe) == has], axis=0)
            for has in (True, False)
        )
        difference = with_it - without
        interval = measures.bootstrap(difference) if len(difference) > 1 else None
        out[name] = {"mean": difference.mean(), "interval": interval}
    return out


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """For each row the models, and the effects."""
    out = []
    for row in rows:
        names = list(row["effects"]["D"])
        title = f"{row['task']}, {row['n']} samples, {'with' if row['embeddings'] else 'without'} layer 0"
        lines = [[r, *(_shown(name, found[name]) for name in names)] for r, found in row["models"].items()]
        for factor, found in row["effects"].items():
            lines.append([f"effect of {factor}", *(_with_interval(name, found[name]) for name in names)])
        out.append(markdown([title, *names], lines))
    return "\n".join(out)


def _shown(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    shown = f"{100 * value:{sign}.1f}" if name.endswith("×") else f"{value:{sign}.2f}"
    return shown.replace("-", "−")


def _with_interval(name: str, found: dict[str, Any]) -> str:
    shown = _shown(name, found["mean"], "+")
    if found["mean"] is None or found["interval"] is None:
        return shown
    low, high = found["interval"]
    return f"{shown} ({100 * low:+.1f} … {100 * high:+.1f})".replace("-", "−")


main = command(NAME, measure, tables)
