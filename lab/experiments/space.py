"""The prototype space by layer, plotted as in the paper (Fig. 10), and its numbers.

    python -m lab experiment space DATA RUNS mrpc-minilm-D-prototypes=sliding-0 mrpc-minilm-D-0 mrpc-minilm-none-0
    python -m lab experiment space --redraw

For h' of every exit of each cell, and for h itself, on unseen samples: the silhouette by true class (cosine), the
accuracy of the nearest prototype, the mean cosine between prototypes, and the gain by log DR of a logistic regression
on margin and entropy, in AUROC for "this exit disagrees with the last", fitted on held-out samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.experiments.ablations import geometry
from lab.experiments.cells import Cell, Trained
from lab.experiments.command import command
from lab.experiments.measures import markdown, number
from lab.experiments.spaces import Spaces, class_means

NAME = "space"
SHOWN = 200  # points a panel
DRAWN = 3  # cells


def of_cell(trained: Trained, draw: bool) -> dict[str, Any]:
    """The numbers of every exit's space; draw: and the t-SNE of some samples."""
    train, held, unseen = (trained.states(part) for part in ("train", "held-out", "unseen"))
    labels = unseen.recorded.labels
    embedded = Spaces(trained.model).embedded(unseen)
    found = geometry(held.recorded, unseen.recorded)
    means = geometry(class_means(train, held, False), class_means(train, unseen, False))
    prototypes = trained.model.prototypes.numpy()
    exits = range(embedded.shape[1])
    row = {
        "cell": trained.cell.name,
        "exits": list(trained.config.exit_layers[:-1]),
        "classifier right": unseen.recorded.correct[:, :-1].mean(0),
        "h'": {
            "silhouette": [silhouette(embedded[:, j], labels) for j in exits],
            "nearest right": found["nearest"],
            "prototype cosine": [mean_cosine(prototypes[j]) for j in exits],
            "gain": found["gain"],
        },
        "h": {
            "silhouette": [silhouette(unseen.pooled[:, j].astype(np.float32), labels) for j in exits],
            "nearest right": means["nearest"],
            "prototype cosine": [
                mean_cosine(_means(train.pooled[:, j], train.recorded.labels)) for j in exits
            ],
            "gain": means["gain"],
        },
    }
    if draw:
        row["labels"] = labels[:SHOWN]
        row["points"] = [tsne(embedded[:SHOWN, j]).round(1) for j in exits]
    return row


def _means(h: NDArray[np.float16], labels: NDArray[Any]) -> NDArray[np.float32]:
    return np.stack([h[labels == k].astype(np.float32).mean(0) for k in np.unique(labels)])


def silhouette(points: NDArray[np.float32], labels: NDArray[Any]) -> float:
    """The mean silhouette by class with cosine distances, in [−1, 1]: above 0, classes are separated."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(points, labels, metric="cosine", sample_size=2_000, random_state=0))


def mean_cosine(prototypes: NDArray[np.float32]) -> float:
    """The mean cosine between the prototypes (K, dim) of different classes: 1 is a space that has collapsed."""
    unit = prototypes / np.linalg.norm(prototypes, axis=-1, keepdims=True)
    cosines = unit @ unit.T
    return float(cosines[~np.eye(len(unit), dtype=bool)].mean())


def tsne(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two coordinates for each point, by t-SNE on cosine distances."""
    from sklearn.manifold import TSNE

    return np.asarray(
        TSNE(metric="cosine", init="random", perplexity=30, random_state=0).fit_transform(points)
    )


def tables(rows: list[dict[str, Any]]) -> str:
    """A line for each cell, space and measure, by exit."""
    exits = max((row["exits"] for row in rows), key=len)
    lines = []
    for row in rows:
        lines.append(
            [row["cell"], "", "classifier right, %", *(f"{100 * x:.1f}" for x in row["classifier right"])]
        )
        for space in ("h'", "h"):
            found = row[space]
            gains = (number(None if x is None else 1000 * x, 1) for x in found["gain"])
            lines.append(
                ["", space, "nearest prototype right, %", *(f"{100 * x:.1f}" for x in found["nearest right"])]
            )
            lines.append(["", "", "silhouette", *(number(x) for x in found["silhouette"])])
            lines.append(["", "", "cosine of prototypes", *(number(x) for x in found["prototype cosine"])])
            lines.append(["", "", "gain by DR, ‰ of AUROC", *gains])
    return markdown(["model", "space", "measure", *(str(m) for m in exits)], lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """t-SNE of h': a line of panels for each cell that has points, a panel for each exit."""
    from matplotlib.figure import Figure

    drawn = [row for row in rows if "points" in row]
    figure = Figure(figsize=(1.7 * len(drawn[0]["points"]), 1.9 * len(drawn)))
    panels = np.atleast_2d(figure.subplots(len(drawn), len(drawn[0]["points"])))
    for row, line in zip(drawn, panels, strict=True):
        labels = np.array(row["labels"])
        for j, (axis, points) in enumerate(zip(line, row["points"], strict=True)):
            x = np.array(points)
            axis.scatter(x[:, 0], x[:, 1], c=labels, s=2, cmap="coolwarm")
            axis.set(xticks=[], yticks=[])
            silhouette = row["h'"]["silhouette"][j]
            axis.set_title(f"exit {row['exits'][j]}: {silhouette:.2f}", fontsize=8)
        line[0].set_ylabel(row["cell"].replace("-minilm", ""), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=64)


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """A row for each cell, the first DRAWN with points."""
    return [of_cell(Trained(cell, root, runs), i < DRAWN) for i, cell in enumerate(cells)]


main = command(NAME, measure, tables, plot)
