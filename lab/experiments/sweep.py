"""Accuracy against speed-up for every task, with the knee of each curve and the speed-up for at most half a point lost.

    python -m lab experiment sweep DATA RUNS sst2-minilm-D-0 mrpc-minilm-D-0
    python -m lab experiment sweep --redraw

Measured on unseen samples; the risk is fitted, and EDR's λ and CAP's α are chosen, on held-out ones. The results of a
task's cells are averaged.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from de3.exits.calibration import speedup
from de3.exits.recorded import Recorded
from lab.experiments import measures
from lab.experiments.cells import Cell, Trained, grouped
from lab.experiments.command import command
from lab.experiments.measures import Floats, fastest_within, markdown, number, right_at
from lab.experiments.scores import CAP_SCALES, LAMS, by_exit, cap, edr
from lab.experiments.signals import model

NAME = "sweep"
LAYERS = {"minilm": 6, "mpnet": 12}
# Costs in units of a layer's time, with int8 kernels on SST-2's lengths. START: of a text, before its first layer and
# outside the model; EXIT: of an exit; CLASS: of each class beyond two, at an exit. A least-squares fit to
# lab/docs/experiments/wall.json, within 5%: a text that exits at layer m takes START + m + (m + 1)·EXIT; without an
# exit on the embeddings, START + m + m·EXIT.
START, EXIT, CLASS = {"minilm": 0.55, "mpnet": 0.09}, {"minilm": 0.08, "mpnet": 0.076}, 0.0009
CLASSES = {"banking77": 77, "clinc150": 150}  # other tasks: 2
LOSS = 0.005
COLORS = {"entropy": "#4c78a8", "EDR": "#59a14f", "CAP": "#b07aa1", "risk": "crimson"}


def of_cell(trained: Trained, first: int) -> tuple[Recorded, dict[str, Floats], dict[str, Floats]]:
    """Unseen samples without the first exits, their scores by signal, and the τ chosen for each signal, (1,).

    The τ is the largest up to which the loss of accuracy on held-out samples stays within half a point. The scores of
    risk on held-out samples are cross-fitted on two halves.

    first: number of exits to omit at the start.
    """
    held, unseen = (trained.states(part).without(first) for part in ("held-out", "unseen"))
    lam = max(LAMS, key=lambda lam: fastest_within(edr(held, lam), held.recorded, LOSS))
    nsp = partial(cap, trained.model, first=first)
    scale = max(CAP_SCALES, key=lambda scale: fastest_within(nsp(held, scale=scale), held.recorded, LOSS))

    def features(states: Any) -> Floats:
        return np.asarray(states.recorded.risk_features)

    scores = {
        "entropy": unseen.recorded.entropy,
        "EDR": edr(unseen, lam),
        "CAP": nsp(unseen, scale=scale),
        "risk": by_exit(held, features)(unseen),
    }
    half = np.arange(len(held.pooled)) % 2 == 0
    crossed = np.ones(held.recorded.entropy.shape)
    for inside in (half, ~half):
        crossed[inside] = by_exit(held.rows(~inside), features)(held.rows(inside))
    on_held = {"entropy": held.recorded.entropy, "EDR": edr(held, lam)}
    on_held |= {"CAP": nsp(held, scale=scale), "risk": crossed}
    taus = {
        name: np.array([measures.tau_within(values, held.recorded, LOSS)]) for name, values in on_held.items()
    }
    return unseen.recorded, scores, taus


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """A row for each task, encoder and recipe, with and without the exit on the embeddings."""
    rows = []
    for (task, encoder, recipe, is_folds), members in grouped(cells).items():
        for first in (0, 1):
            found = [of_cell(Trained(cell, root, runs), first) for cell in members]
            row: dict[str, Any] = {"task": task, "encoder": encoder, "recipe": recipe, "folds": is_folds}
            row |= {"cells": len(members), "embeddings": first == 0, "signals": {}}
            row["n"] = sum(len(f[0].labels) for f in found)
            row["full"] = np.mean([f[0].correct[:, -1].mean() for f in found])
            for name in found[0][1]:
                row["signals"][name] = of_signal([(f[0], f[1][name], float(f[2][name][0])) for f in found])
            rows.append(row)
    return rows


def of_signal(parts: Sequence[tuple[Recorded, Floats, float]]) -> dict[str, Any]:
    """The curve of one signal, averaged over models, and its results for a loss of half a point.

    The results: the speed-up in hindsight, and the mean exit layer and loss at the τ chosen on held-out samples. `knee`
    is the speed-up and accuracy at the knee, or None if the curve has none.

    parts: for each model, the unseen samples, their scores and the chosen τ.
    """
    grid = [1 + 0.1 * i for i in range(71)]
    accuracy = [
        float(np.mean([right_at(scores, recorded, s).mean() for recorded, scores, _ in parts])) for s in grid
    ]
    known = [i for i, a in enumerate(accuracy) if not np.isnan(a)]
    speedups, accuracy = [grid[i] for i in known], [accuracy[i] for i in known]
    at = measures.knee(speedups, accuracy)
    chosen = [measures.at(scores, recorded, tau) for recorded, scores, tau in parts]
    return {
        "curve": [speedups, accuracy],
        "knee": None if at is None else [speedups[at], accuracy[at]],
        "hindsight": float(
            np.mean([fastest_within(scores, recorded, LOSS) for recorded, scores, _ in parts])
        ),
        "chosen": {
            "mean_layer": float(np.mean([depth for depth, _ in chosen])),
            "loss": float(np.mean([loss for _, loss in chosen])),
        },
    }


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """The speed-ups at half a point lost: of each signal in hindsight, of risk at the τ chosen on held-out samples."""
    columns = [
        "model",
        "full depth, %",
        "layer 0",
        *COLORS,
        "knee of risk",
        "chosen: in layers",
        "in time",
        "lost",
    ]
    lines = []
    for row in rows:
        num_layers = LAYERS[row["encoder"]]
        risk = row["signals"]["risk"]
        depth, knee = risk["chosen"]["mean_layer"], risk["knee"]
        line = [model(row), f"{100 * row['full']:.1f}", "yes" if row["embeddings"] else "no"]
        line += [f"{row['signals'][name]['hindsight']:.2f}×" for name in COLORS]
        line += [
            "–" if knee is None else f"{knee[0]:.1f}×, {100 * knee[1]:.1f}%",
            f"{speedup(num_layers, depth):.2f}×",
        ]
        line += [f"{in_time(row, depth):.2f}×", number(100 * risk["chosen"]["loss"], 2)]
        lines.append(line)
    return markdown(columns, lines)


def in_time(row: dict[str, Any], depth: float) -> float:
    """The speed-up in time of a model at a mean exit layer, against τ = 0, at which only the last exit runs."""
    encoder = row["encoder"]
    an_exit = EXIT[encoder] + CLASS * (CLASSES.get(row["task"], 2) - 2)
    exits = depth + 1 if row["embeddings"] else depth
    return (START[encoder] + LAYERS[encoder] + an_exit) / (START[encoder] + depth + exits * an_exit)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot a panel for each model. Dotted lines: without the exit on the embeddings. Rings: the knees."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys((row["task"], row["encoder"], row["recipe"]) for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines))
    axes = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axis, name in zip(axes, names, strict=False):
        for row in (r for r in rows if (r["task"], r["encoder"], r["recipe"]) == name):
            for signal, color in COLORS.items():
                found = row["signals"][signal]
                x, y = (np.array(values) for values in found["curve"])
                style, label = ("-", signal) if row["embeddings"] else (":", None)
                axis.plot(x, 100 * y, style, color=color, linewidth=1.2, label=label)
                if found["knee"] is not None:
                    axis.plot(found["knee"][0], 100 * found["knee"][1], "o", mfc="none", color=color)
        axis.axhline(100 * row["full"], color="grey", linewidth=0.6)
        axis.set_title(" ".join(name[:2]) + (f" {name[2]}" if name[2] != "D" else ""), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.set_xlim(1, 8)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=7, loc="lower left")
    figure.supxlabel("speed-up, layers", fontsize=9)
    figure.supylabel("accuracy, %", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=50)


main = command(NAME, measure, tables, plot)
