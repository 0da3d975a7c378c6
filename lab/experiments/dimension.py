"""Width of the prototype space: networks of 16 to 768 dimensions, five seeds, on cached states.

    python -m lab experiment dimension DATA RUNS mrpc-minilm-D-0 clinc150-minilm-D-0
    python -m lab experiment dimension --redraw

Accuracy of EDR (λ chosen on held-out samples) and of risk on unseen samples at 2× and 3×, the merit of risk, and the
multiplications that the network and the distances add to a layer's, for a text of 25 tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from de3.training.model import De3Config
from lab.experiments.ablations import geometry
from lab.experiments.cells import Cell, Trained
from lab.experiments.command import command
from lab.experiments.measures import markdown
from lab.experiments.spaces import Spaces

NAME = "dimension"
DIMS = (16, 32, 64, 128, 256, 384, 768)
SEEDS = 5
TOKENS = 25


def of_cell(trained: Trained, dims: tuple[int, ...] = DIMS, seeds: int = SEEDS) -> dict[str, Any]:
    """The measures by dimension, each the mean and the standard deviation over the seeds."""
    train, held, unseen = (trained.states(part) for part in ("train", "held-out", "unseen"))
    rows = []
    for dim in dims:
        found = []
        for seed in range(seeds):
            spaces = Spaces.fit(trained.model, train, dim, seed)
            g = geometry(spaces.recorded(held), spaces.recorded(unseen))
            found.append(
                [
                    g["edr"]["2"],
                    g["edr"]["3"],
                    g["risk"]["2"],
                    g["risk"]["3"],
                    g["merit"],
                    np.nanmean(g["gain"]),
                ]
            )
        rows.append(
            {
                "dim": dim,
                "mean": np.mean(found, axis=0),
                "spread": np.std(found, axis=0, ddof=1),
                "overhead": overhead(trained.config, dim),
            }
        )
    return {"cell": trained.cell.name, "full": unseen.recorded.correct[:, -1].mean(), "rows": rows}


def overhead(config: De3Config, dim: int, tokens: int = TOKENS) -> float:
    """The multiplications of one prototypical network and its distances as a share of an encoder layer's."""
    hidden, inner = config.hidden_size, int(config.encoder["intermediate_size"])
    layer = tokens * (4 * hidden * hidden + 2 * hidden * inner) + 2 * tokens * tokens * hidden
    return float((hidden * dim + dim * config.num_labels) / layer)


def tables(results: list[dict[str, Any]]) -> str:
    """A line for each cell and dimension."""
    lines = []
    for result in results:
        for row in result["rows"]:
            cells = (
                f"{s * m:.2f} ± {s * d:.2f}"
                for s, m, d in zip((100, 100, 100, 100, 1, 1000), row["mean"], row["spread"], strict=True)
            )
            work = f"{100 * row['overhead']:.2f}"
            lines.append([result["cell"], str(row["dim"]), *(cell.replace("-", "−") for cell in cells), work])
    columns = [
        "model",
        "width",
        "EDR 2×",
        "EDR 3×",
        "risk 2×",
        "risk 3×",
        "merit",
        "gain, ‰",
        "added work, %",
    ]
    return markdown(columns, lines)


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """A row for each cell."""
    return [of_cell(Trained(cell, root, runs)) for cell in cells]


main = command(NAME, measure, tables)
