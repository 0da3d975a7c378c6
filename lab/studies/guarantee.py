"""Certificates of disagreement, and their cost: calibration repeated by resampling."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from de3.exits import calibration
from de3.exits.calibration import Samples
from de3.exits.signals import Signal
from de3.progress import track


def guarantee(
    population: Samples,
    signal: Signal,
    size: int,
    wishes: Sequence[float],
    trials: int,
    start_layers: float,
    taus: Sequence[float] = calibration.FINE_TAUS,
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each wish (a target max_disagreement): how often it is violated, and the speed-up relative to an oracle's.

    The rates of the population are the true rates. Each trial draws `size` groups of related samples with replacement,
    certifies on them as export does, takes the largest τ whose bound is within the wish, and looks up its true rate.
    The oracle takes the fastest τ whose true rate is within the wish.

    start_layers: cost of tokenizer, embeddings and their exit, in layers, for the speed-up in time.
    """
    scores = signal.scores(population.recorded)
    table = calibration.trade_off(population, signal, taus, scores)
    truths = np.array([row.disagreement for row in table])
    depths = np.array([row.mean_exit_layer for row in table])
    members = np.split(
        np.argsort(population.groups, kind="stable"), np.bincount(population.groups).cumsum()[:-1]
    )
    generator = np.random.default_rng(seed)
    chosen = np.zeros((trials, len(wishes)), int)
    for trial in track(range(trials), "Repeating the calibration"):
        drawn = [members[k] for k in generator.integers(len(members), size=size)]
        rows = np.concatenate(drawn)
        groups = np.repeat(np.arange(size), [len(group) for group in drawn])
        certified = calibration.trade_off(
            Samples(population.recorded.rows(rows), groups), signal, taus, scores[rows]
        )
        bounds = [row.disagreement_bound for row in certified]  # ascending
        chosen[trial] = np.searchsorted(bounds, wishes, side="right") - 1
    rows_by_wish = []
    for wish, picks in zip(wishes, chosen.T, strict=True):
        oracle = float(depths[truths <= wish].min())
        layers = depths[picks]
        share = np.divide(oracle, layers, out=np.ones_like(layers), where=layers > 0)
        rows_by_wish.append(
            {
                "wish": wish,
                "broken": float((truths[picks] > wish).mean()),
                "speedup": calibration.speedup(population.recorded.exit_layers[-1], float(layers.mean())),
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
