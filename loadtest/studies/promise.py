"""Do promises of a largest disagreement hold, and what do they cost? Calibration repeated by resampling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from exits import calibration, guarantee
from exits.recorded import Recorded
from exits.rule import exit_index
from exits.signals import signal_of


def promise(
    population: Recorded,
    lam: float,
    size: int,
    wishes: Sequence[float],
    trials: int,
    start_layers: float,
    taus: Sequence[float] = calibration.FINE_TAUS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each wish: how often its promise is broken, and its speed against an oracle's.

    The population stands for the world: its rates are the true ones. Each trial draws `size` samples of it
    with replacement, certifies with them, takes the largest τ whose bound keeps the wish, and looks up the
    true rate. The oracle takes the fastest τ whose true rate keeps the wish.

    start_layers: what tokens, embeddings and their exit cost, in layers; for the speed by time.
    """
    labels, rows = population.logits.argmax(-1), np.arange(len(population.labels))
    scores, taus = signal_of(lam).scores(population), sorted(t for t in taus if t > 0)
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
        times = np.bincount(generator.integers(len(rows), size=size), minlength=len(rows))
        errors = [round(float(x)) for x in times @ differs]
        bounds = guarantee.sequence_bounds(errors, size)
        chosen[trial] = np.searchsorted(bounds, wishes, side="right")  # bounds ascend
    found = []
    for wish, picks in zip(wishes, chosen.T, strict=True):
        oracle = float(depths[truths <= wish].min())
        layers = depths[picks]
        share = np.divide(oracle, layers, out=np.ones_like(layers), where=layers > 0)
        found.append(
            {
                "wish": wish,
                "broken": float((truths[picks] > wish).mean()),
                "speedup": calibration.speedup(population.exit_layers[-1], float(layers.mean())),
                "of_oracle_layers": float(share.mean()),
                "of_oracle_time": float(((oracle + start_layers) / (layers + start_layers)).mean()),
            }
        )
    return found


def table(rows: list[dict[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows to print."""
    columns = ["wish", "broken", "speed-up", "of the oracle's: layers", "model time"]
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
