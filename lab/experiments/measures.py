"""Measures of the studies: accuracy at an exact speed-up, intervals of differences, AUROC; and result files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from de3.exits.calibration import DISAGREEMENTS
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index

Floats = NDArray[np.float64]
SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
RESULTS = Path("lab/docs/experiments")
BOOTSTRAPS = 2_000


def thresholds(scores: Floats) -> Floats:
    """Every τ that makes a difference, ascending from −∞ (no early exit) to ∞.

    If there are more than 2,000 finite ones, 2,000 quantiles of the scores take their place.
    """
    early = scores[:, :-1]
    early = np.unique(early[np.isfinite(early)])
    if len(early) > 2_000:
        early = np.unique(np.quantile(early, np.linspace(0, 1, 2_000)))
    return np.concatenate([[-np.inf], early, [np.inf]])


def right_at(scores: Floats, recorded: Recorded, speedup: float) -> Floats:
    """Correctness of each text at a speed-up in layers, (n,), interpolated between two τ.

    τ needs no labels, so it is set on the measured texts, and all signals are compared at the same speed-up. NaN if
    even the largest τ is slower.
    """
    layers, rows = np.asarray(recorded.exit_layers), np.arange(len(scores))
    correct = recorded.correct.astype(float)
    wanted = layers[-1] / speedup
    taus = thresholds(scores)
    low, high = 0, len(taus) - 1  # the mean layer falls as τ rises
    if layers[exit_index(scores, float(taus[-1]))].mean() > wanted:
        return np.full(len(scores), np.nan)
    while high - low > 1:
        middle = (low + high) // 2
        if layers[exit_index(scores, float(taus[middle]))].mean() > wanted:
            low = middle
        else:
            high = middle
    slow, fast = (exit_index(scores, float(taus[i])) for i in (low, high))
    depths = [layers[index].mean() for index in (slow, fast)]
    share = (depths[0] - wanted) / (depths[0] - depths[1]) if depths[0] > depths[1] else 1.0
    return np.asarray((1 - share) * correct[rows, slow] + share * correct[rows, fast])


def knee(speedups: Sequence[float], scores: Sequence[float]) -> int | None:
    """Index of the point farthest above the chord from first to last point; None if it is less than 0.005 above."""
    x, y = np.asarray(speedups), np.asarray(scores)
    above = y - (y[0] + (y[-1] - y[0]) * (x - x[0]) / max(x[-1] - x[0], 1e-9))
    return int(np.argmax(above)) if above.max() >= 0.005 else None


def bootstrap(difference: Floats, seed: int = 0) -> tuple[float, float]:
    """95% paired-bootstrap interval of a mean difference. difference: of each pair, (n,)."""
    rng = np.random.default_rng(seed)
    n = len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(BOOTSTRAPS)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def mean_speedup(scores: Floats, recorded: Recorded) -> float:
    """The geometric mean of the speed-ups in layers at 1, 2 and 5% disagreement, with the best τ in hindsight."""
    return float(np.exp(np.mean(np.log([speed_within(scores, recorded, d) for d in DISAGREEMENTS]))))


def speed_within(scores: Floats, recorded: Recorded, disagreement: float) -> float:
    """The highest speed-up in layers at any τ whose rate of disagreement with full depth is within `disagreement`."""
    layers, rows, differs = np.asarray(recorded.exit_layers), np.arange(len(scores)), recorded.differs
    best = 1.0
    for tau in thresholds(scores):
        index = exit_index(scores, float(tau))
        if differs[rows, index].mean() <= disagreement:
            best = max(best, float(layers[-1] / max(layers[index].mean(), 0.05)))
    return best


def fastest_within(scores: Floats, recorded: Recorded, loss: float) -> float:
    """The highest speed-up in layers at any τ that loses at most `loss` of accuracy (a fraction) to full depth."""
    layers, rows, correct = np.asarray(recorded.exit_layers), np.arange(len(scores)), recorded.correct
    full, best = correct[:, -1].mean(), 1.0
    for tau in thresholds(scores):
        index = exit_index(scores, float(tau))
        if full - correct[rows, index].mean() <= loss + 1e-9:
            best = max(best, float(layers[-1] / max(layers[index].mean(), 0.05)))
    return best


def tau_within(scores: Floats, recorded: Recorded, loss: float) -> float:
    """The largest τ up to which no τ loses more accuracy than `loss` on these samples; −∞ if there is no finite one."""
    rows, correct = np.arange(len(scores)), recorded.correct
    full, chosen = correct[:, -1].mean(), -np.inf
    for tau in thresholds(scores):
        if full - correct[rows, exit_index(scores, float(tau))].mean() > loss + 1e-9:
            break
        chosen = float(tau)
    return chosen


def at(scores: Floats, recorded: Recorded, tau: float) -> tuple[float, float]:
    """The mean exit layer and the loss of accuracy at a τ."""
    index, correct = exit_index(scores, tau), recorded.correct
    loss = correct[:, -1].mean() - correct[np.arange(len(index)), index].mean()
    return float(np.asarray(recorded.exit_layers)[index].mean()), float(loss)


def auroc(scores: Floats, positive: NDArray[Any]) -> float:
    """The area under the ROC curve, where ties count half; NaN if all samples have the same outcome."""
    positive = np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return float("nan")
    _, number, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[number]
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for None or NaN."""
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def auroc_by_exit(scores: Floats, recorded: Recorded) -> list[float]:
    """AUROC of the scores for "this exit disagrees with the last", for each exit but the last."""
    return [auroc(scores[:, j], recorded.differs[:, j]) for j in range(scores.shape[1] - 1)]


def mean_auroc(scores: Floats, recorded: Recorded) -> float:
    """The mean of `auroc_by_exit`, ignoring NaN; NaN if there is no other value."""
    areas = auroc_by_exit(scores, recorded)
    return float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")


def save(name: str, results: Any) -> None:
    """Write a study's results to RESULTS/NAME.json, with 5 significant digits and null for NaN."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(_rounded(results), ensure_ascii=False) + "\n")


def load(name: str) -> Any:
    """Read a study's results, as `save` wrote them."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_rounded(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return None if np.isnan(value) else float(f"{value:.5g}")
    return value.item() if isinstance(value, np.generic) else value
