"""Ablations of DE3-BERT: DAR, prototypes, their distance, the fusion, and its λ.

    python -m lab experiment ablations DATA RUNS mrpc-minilm-D-0
    python -m lab experiment ablations --redraw

Accuracy on unseen samples at fixed speed-ups. λ, and the weight of the other fusions, are chosen for each speed-up on
held-out samples; "best λ" is the best on the unseen ones, so the gap between the two is the cost of choosing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from de3.exits import formulas
from de3.exits.recorded import Recorded
from lab.experiments.cells import Cell, States, Trained
from lab.experiments.command import command
from lab.experiments.measures import SPEEDUPS, Floats, auroc_by_exit, markdown, merit, number, right_at
from lab.experiments.scores import LAMS, by_exit
from lab.experiments.spaces import Spaces, class_means, nearest_is_right

NAME = "ablations"
PROTOTYPES = ["nearest right by exit, %", "DR 2×, 3×", "EDR", "risk", "merit", "gain by exit, ‰"]


def arithmetic(h: Floats, dr: Floats, lam: float) -> Floats:
    """(entropy + λ·DR)/(1 + λ)."""
    return np.asarray((h + lam * dr) / (1 + lam))


def geometric(h: Floats, dr: Floats, lam: float) -> Floats:
    """(entropy · DR^λ)^(1/(1+λ))."""
    log = (np.log(np.maximum(h, 1e-12)) + lam * np.log(np.maximum(dr, 1e-12))) / (1 + lam)
    return np.asarray(np.exp(log))


def largest(h: Floats, dr: Floats, lam: float) -> Floats:
    """max(entropy, λ·DR): both must be small."""
    return np.asarray(np.maximum(h, lam * dr))


FUSIONS: dict[str, Callable[[Floats, Floats, float], Floats]] = {
    "harmonic (Eq. 12)": formulas.edr,
    "arithmetic": arithmetic,
    "geometric": geometric,
    "maximum": largest,
}


def fused(how: str, recorded: Recorded, lam: float) -> Floats:
    """A fusion's scores, (n, exits)."""
    return FUSIONS[how](recorded.entropy, recorded.distance_ratio, lam)


def by_lam(how: str, held: Recorded, unseen: Recorded) -> dict[str, Any]:
    """For each speed-up: the accuracy by λ on unseen samples, the λ chosen on held-out ones, and the best one."""
    found: dict[str, Any] = {}
    for speedup in SPEEDUPS:
        on = [
            [right_at(fused(how, part, lam), part, speedup).mean() for lam in LAMS] for part in (held, unseen)
        ]
        chosen, best = (int(np.nanargmax(values)) for values in on)
        found[f"{speedup:g}"] = {
            "by_lam": on[1],
            "chosen": [LAMS[chosen], on[1][chosen]],
            "best": [LAMS[best], on[1][best]],
        }
    return found


def geometry(held: Recorded, unseen: Recorded) -> dict[str, Any]:
    """Measures of distances: by exit the nearest prototype's accuracy, and the gain of DR over entropy in AUROC for
    "this exit disagrees with the last"; accuracy of EDR with the chosen λ, and of risk; merit of risk."""
    states = [States(np.zeros((len(r.labels), 1, 1), np.float16), r) for r in (held, unseen)]
    areas = []
    for features in (slice(0, 4), slice(0, 5)):
        scores = by_exit(states[0], partial(_some, which=features))(states[1])
        areas.append(auroc_by_exit(scores, unseen))
    return {
        "nearest": nearest_is_right(unseen),
        "gain": np.array(areas[1]) - np.array(areas[0]),
        "edr": {s: v["chosen"][1] for s, v in by_lam("harmonic (Eq. 12)", held, unseen).items()},
        "dr": {f"{s:g}": right_at(unseen.distance_ratio, unseen, s).mean() for s in SPEEDUPS},
        "risk": {f"{s:g}": right_at(scores, unseen, s).mean() for s in SPEEDUPS},
        "merit": merit(scores, unseen),
    }


def _some(states: States, which: slice) -> Floats:
    return np.asarray(states.recorded.risk_features[..., which])


def of_cell(trained: Trained) -> dict[str, Any]:
    """All fusions, and all kinds of prototypes that need no training of the encoder."""
    train, held, unseen = (trained.states(part) for part in ("train", "held-out", "unseen"))
    row: dict[str, Any] = {"cell": trained.cell.name, "n": len(unseen.pooled)}
    row["full"] = unseen.recorded.correct[:, -1].mean()
    row["exits"] = unseen.recorded.correct.mean(0)
    row["entropy"] = {
        f"{s:g}": right_at(unseen.recorded.entropy, unseen.recorded, s).mean() for s in SPEEDUPS
    }
    row["fusions"] = {how: by_lam(how, held.recorded, unseen.recorded) for how in FUSIONS}
    refit = Spaces.fit(trained.model, train)
    row["prototypes"] = {
        "as trained": geometry(held.recorded, unseen.recorded),
        "fitted on states": geometry(refit.recorded(held), refit.recorded(unseen)),
        "class means of h": geometry(class_means(train, held, False), class_means(train, unseen, False)),
        "centred class means of h": geometry(
            class_means(train, held, True), class_means(train, unseen, True)
        ),
    }
    return row


def tables(rows: list[dict[str, Any]]) -> str:
    """λ, fusions, and prototypes; then the cells that were trained with other settings, beside the plain ones."""
    special = [row for row in rows if Cell.parse(row["cell"]).more]
    tasks = {Cell.parse(row["cell"]).task for row in special}
    plain = [row for row in rows if row not in special]
    beside = [row for row in plain if Cell.parse(row["cell"]).task in tasks]
    out = _of_plain(plain)
    if special:
        columns = ["model", "full depth, %", "entropy 2×, 3×", *PROTOTYPES]
        lines = []
        for row in [*beside, *special]:
            entropy = ", ".join(_percent(row["entropy"][s]) for s in ("2", "3"))
            lines.append(
                [row["cell"], _percent(row["full"]), entropy, *_geometry(row["prototypes"]["as trained"])]
            )
        out.append(markdown(columns, lines))
    return "\n".join(out)


def _of_plain(rows: list[dict[str, Any]]) -> list[str]:
    """λ, fusions, prototypes: a table each."""
    out = []
    lines = []
    for row in rows:
        found = row["fusions"]["harmonic (Eq. 12)"]
        pairs = (found[s] for s in ("2", "3"))
        cells = (
            f"{p['chosen'][0]:g}: {100 * p['chosen'][1]:.1f}; {p['best'][0]:g}: {100 * p['best'][1]:.1f}"
            for p in pairs
        )
        lines.append([row["cell"], *(f"{100 * row['entropy'][s]:.1f}" for s in ("2", "3")), *cells])
    columns = ["model", "entropy 2×", "3×", "EDR 2×: λ chosen; best", "3×"]
    out.append(markdown(columns, lines))
    columns = ["fusion, λ chosen on held-out", *(f"{row['cell']} {s}×" for row in rows for s in ("2", "3"))]
    lines = [["entropy alone", *(f"{100 * row['entropy'][s]:.1f}" for row in rows for s in ("2", "3"))]]
    for how in FUSIONS:
        lines.append(
            [how, *(f"{100 * row['fusions'][how][s]['chosen'][1]:.1f}" for row in rows for s in ("2", "3"))]
        )
    alone = [_percent(row["prototypes"]["as trained"]["dr"][s]) for row in rows for s in ("2", "3")]
    out.append(markdown(columns, [*lines, ["distance ratio alone", *alone]]))
    lines = []
    for row in rows:
        lines += [[row["cell"], kind, *_geometry(found)] for kind, found in row["prototypes"].items()]
    out.append(markdown(["model", "prototypes", *PROTOTYPES], lines))
    return out


def _geometry(found: dict[str, Any]) -> list[str]:
    """The cells of PROTOTYPES."""
    pairs = (", ".join(_percent(found[key][s]) for s in ("2", "3")) for key in ("dr", "edr", "risk"))
    nearest = " ".join(f"{100 * x:.0f}" for x in found["nearest"])
    gain = " ".join("–" if x is None else f"{1000 * x:+.0f}" for x in found["gain"]).replace("-", "−")
    return [nearest, *pairs, f"{found['merit']:.2f}", gain]


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, 1)


def measure(cells: Sequence[Cell], root: Path, runs: Path) -> list[dict[str, Any]]:
    """A row for each cell."""
    return [of_cell(Trained(cell, root, runs)) for cell in cells]


main = command(NAME, measure, tables)
