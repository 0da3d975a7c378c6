"""Do the guarantees on disagreement hold, and what do they cost? Calibration repeated by resampling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from exits import calibration, guarantee
from exits.recorded import Recorded
from exits.rule import exit_index
from exits.signals import Signal


def promise(
    population: Recorded,
    signal: Signal,
    size: int,
    wishes: Sequence[float],
    trials: int,
    start_layers: float,
    taus: Sequence[float] = calibration.FINE_TAUS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each wish (a max_disagreement): how often it is violated, and the speed-up against an oracle's.

    The rates of the population are the true rates. Each trial draws `size` samples with replacement,
    certifies on them, takes the largest τ whose bound is within the wish, and looks up its true rate. The
    oracle takes the fastest τ whose true rate is within the wish.

    start_layers: the cost of tokenization, embeddings and their exit, in layers, for the speed-up by time.
    """
    labels, rows = population.logits.argmax(-1), np.arange(len(population.labels))
    scores, taus = signal.scores(population), sorted(t for t in taus if t > 0)
    differs = np.empty((len(rows), len(taus)), np.float64)
    depth = np.empty(len(taus))
    for i, tau in enumerate(taus):
        index = exit_index(scores, tau)
        differs[:, i] = labels[rows, index] != labels[:, -1]
        depth[i] = np.asarray(population.exit_layers)[index].mean()
    truth, full = differs.mean(0), float(population.exit_layers[-1])
    depths, truths = np.concatenate([[full], depth]), np.concatenate([[0.0], truth])  # index 0: τ = 0
    generator = np.random.default_rng(seed)
    chosen = np.zeros((trials, len(wishes)), int)
    for trial in range(trials):
        counts = np.bincount(generator.integers(len(rows), size=size), minlength=len(rows))
        errors = [round(float(count)) for count in counts @ differs]
        bounds = guarantee.sequence_bounds(errors, size)
        chosen[trial] = np.searchsorted(bounds, wishes, side="right")  # bounds ascend
    rows_by_wish = []
    for wish, picks in zip(wishes, chosen.T, strict=True):
        oracle = float(depths[truths <= wish].min())
        layers = depths[picks]
        share = np.divide(oracle, layers, out=np.ones_like(layers), where=layers > 0)
        rows_by_wish.append(
            {
                "wish": wish,
                "broken": float((truths[picks] > wish).mean()),
                "speedup": calibration.speedup(population.exit_layers[-1], float(layers.mean())),
                "of_oracle_layers": float(share.mean()),
                "of_oracle_time": float(((oracle + start_layers) / (layers + start_layers)).mean()),
            }
        )
    return rows_by_wish


def table(rows: list[dict[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """The columns and rows of a table."""
    columns = ["max. disagreement", "violated", "speed-up", "of the oracle's: layers", "model time"]
    return columns, [
        [
            f"{100 * r['wish']:g}%",
            f"{100 * r['broken']:.1f}%",
            f"{r['speedup']:.2f}×",
            f"{r['of_oracle_layers']:.3f}",
            f"{r['of_oracle_time']:.3f}",
        ]
        for r in rows
    ]
