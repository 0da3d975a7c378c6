"""What the exits that `exits.placement` chooses save on other texts than those of the choice, on random splits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from de3.exits import placement, risk
from de3.exits.calibration import DISAGREEMENTS
from de3.exits.guarantee import profiles
from de3.exits.recorded import Recorded


@dataclass(frozen=True)
class Found:
    """Time with all exits, as a multiple of that with the chosen ones, at the best τ for each of DISAGREEMENTS.

    Attributes:
        cost: time of an exit in layers, by which both are compared.
        ratios: by split and limit, (splits, limits).
    """

    cost: float
    ratios: np.ndarray


def study(
    recorded: Recorded, cost: float, size: int, splits: int
) -> tuple[list[Found], Counter[tuple[int, ...]]]:
    """Compare at several costs of an exit, and count the chosen layers.

    cost: time of an exit, by which exits are chosen. size: number of texts to which risk is fitted (without states, and
    cross-fitted) and on which exits are chosen.
    """
    recorded, layers = replace(recorded, states=None), recorded.exit_layers
    every, chosen = list(range(len(layers) - 1)), Counter[tuple[int, ...]]()
    found = [
        Found(each, np.zeros((splits, len(DISAGREEMENTS)))) for each in (0.0, cost / 2, cost, 1.5 * cost)
    ]
    for seed in range(splits):
        order = np.random.default_rng(seed).permutation(len(recorded.labels))
        fitting, others = recorded.rows(order[:size]), recorded.rows(order[size:])
        unused = placement.unused_exits(fitting, risk.cross_fit(fitting), cost)
        used = [j for j in every if j not in unused]
        chosen[tuple(layers[j] for j in used)] += 1
        scores = risk.fit(fitting).scores(others)
        for one in found:
            whole, some = (np.array(_times(others, scores, exits, one.cost)) for exits in (every, used))
            one.ratios[seed] = whole / some
    return found, chosen


def _times(recorded: Recorded, scores: np.ndarray, used: Sequence[int], cost: float) -> list[float]:
    """The least time of a text, in layers, for each limit."""
    layers, exits = recorded.exit_layers, [*used, len(recorded.exit_layers) - 1]
    costs = np.array([layers[j] + cost * (i + 1) for i, j in enumerate(exits)])
    differs, times = profiles(scores[:, exits], recorded.differs[:, exits], costs, placement.TAUS)
    return [float(times.mean(0)[differs.mean(0) <= limit].min(initial=costs[-1])) for limit in DISAGREEMENTS]
