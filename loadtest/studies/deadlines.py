"""Before a deadline: the default τ, or the most accurate τ predicted to fit? A simulated server."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exits import calibration
from exits.recorded import Recorded
from exits.rule import exit_index
from exits.signals import signal_of

THREADS = 2


@dataclass(frozen=True)
class Costs:
    """Seconds of a text up to its first exit, and of each layer after."""

    start_s: float
    layer_s: float


def simulate(
    found: Recorded,
    exits: Sequence[tuple[float, Any]],
    costs: Costs,
    budget_s: float,
    rate: float,
    seed: int = 0,
) -> dict[str, float]:
    """Serve every text once, first come first served; all leave at their deadline at the latest.

    exits: for each τ that may be chosen, by ascending τ, the mean depth that is predicted and where each
        text would leave. Of them the first is taken whose predicted finish fits, else the last.
    rate: texts a second, at random times; 0: each text finds the server idle.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(found.labels))
    arrivals = (
        np.cumsum(generator.exponential(1 / rate, len(order))) if rate else np.arange(len(order)) * 10.0
    )
    depths = np.asarray(found.exit_layers)
    free = [0.0] * THREADS
    right, layers, refused = 0, 0, 0
    for text, arrival in zip(order, arrivals, strict=True):
        start = max(arrival, heapq.heappop(free))
        left = arrival + budget_s - start - costs.start_s
        if left < 0:
            refused += 1
            heapq.heappush(free, start)
            continue
        wanted = next((at for mean, at in exits if mean * costs.layer_s <= left), exits[-1][1])[text]
        reach = int(np.searchsorted(depths, int(left / costs.layer_s), side="right")) - 1
        index = min(wanted, max(0, reach))
        right += bool(found.correct[text, index])
        layers += int(depths[index])
        heapq.heappush(free, start + costs.start_s + int(depths[index]) * costs.layer_s)
    answered = len(order) - refused
    return {
        "accuracy": right / max(1, answered),
        "layers": layers / max(1, answered),
        "refused": refused / len(order),
    }


def deadlines(
    found: Recorded,
    tau: float,
    lam: float,
    costs: Costs,
    cases: Sequence[tuple[float, float]],
    seeds: int = 5,
) -> list[dict[str, Any]]:
    """Both policies for each case (budget in ms, share of the capacity at τ); means over seeds."""
    scores = signal_of(lam).scores(found)

    def leaving(at: float) -> tuple[float, Any]:
        index = exit_index(scores, at)
        return float(np.asarray(found.exit_layers)[index].mean()), index

    policies = {"default": [leaving(tau)], "predicted": [leaving(t) for t in calibration.TAUS]}
    capacity = THREADS / (costs.start_s + policies["default"][0][0] * costs.layer_s)
    rows = []
    for budget_ms, load in cases:
        row: dict[str, Any] = {"budget_ms": budget_ms, "load": load}
        rate = load * capacity
        for name, exits in policies.items():
            runs = [simulate(found, exits, costs, budget_ms / 1000, rate, seed) for seed in range(seeds)]
            row[name] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        rows.append(row)
    return rows
