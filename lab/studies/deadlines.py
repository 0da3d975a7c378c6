"""Requests with deadlines in a simulated server: the default τ against the most accurate τ predicted to meet them."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from de3.exits import calibration
from de3.exits.recorded import Recorded
from de3.exits.rule import exit_index
from de3.exits.signals import Signal

THREADS = 2


@dataclass(frozen=True)
class Costs:
    """Time of a text before its first layer (tokenizer, embeddings and their exit), and of each layer, in seconds."""

    start_s: float
    layer_s: float


def simulate(
    recorded: Recorded,
    exits: Sequence[tuple[float, Any]],
    costs: Costs,
    budget_s: float,
    rate: float,
    seed: int = 0,
) -> dict[str, float]:
    """Serve every text once in FIFO order; returns accuracy, mean exit layer, and share of refused texts.

    A text whose deadline would pass before its first layer is refused. The others leave at the exit of their τ, or at
    the last exit that their deadline allows, if that is earlier (the first exit is always allowed).

    exits: for each available τ, ascending, the predicted mean depth and the exit of each text. A text uses the first τ
        whose predicted time meets its deadline, else the last.
    budget_s: time from the arrival of a text to its deadline.
    rate: Poisson arrivals per second; 0: the server is idle for each text.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(recorded.labels))
    arrivals = (
        np.cumsum(generator.exponential(1 / rate, len(order))) if rate else np.arange(len(order)) * 10.0
    )
    depths, is_correct = np.asarray(recorded.exit_layers), recorded.correct
    free = [0.0] * THREADS  # when each thread becomes idle
    correct, layers, refused = 0, 0, 0
    for text, arrival in zip(order, arrivals, strict=True):
        start = max(arrival, heapq.heappop(free))
        left_s = arrival + budget_s - start - costs.start_s
        if left_s < 0:
            refused += 1
            heapq.heappush(free, start)
            continue
        wanted = next((index for mean, index in exits if mean * costs.layer_s <= left_s), exits[-1][1])[text]
        reachable = int(np.searchsorted(depths, int(left_s / costs.layer_s), side="right")) - 1
        index = min(wanted, max(0, reachable))
        correct += bool(is_correct[text, index])
        layers += int(depths[index])
        heapq.heappush(free, start + costs.start_s + int(depths[index]) * costs.layer_s)
    answered = len(order) - refused
    return {
        "accuracy": correct / max(1, answered),
        "layers": layers / max(1, answered),
        "refused": refused / len(order),
    }


def deadlines(
    recorded: Recorded,
    tau: float,
    signal: Signal,
    costs: Costs,
    cases: Sequence[tuple[float, float]],
    seeds: int = 5,
) -> list[dict[str, Any]]:
    """Simulate two policies, the fixed `tau` and a τ predicted to meet each deadline.

    Returns a row for each case, averaged over seeds.

    cases: budget in ms, and utilization as a share of the capacity at `tau`; 0: the server is idle for each text.
    """
    scores = signal.scores(recorded)

    def exits_at(tau: float) -> tuple[float, Any]:
        index = exit_index(scores, tau)
        return float(np.asarray(recorded.exit_layers)[index].mean()), index

    policies = {"default": [exits_at(tau)], "predicted": [exits_at(t) for t in calibration.TAUS]}
    capacity = THREADS / (costs.start_s + policies["default"][0][0] * costs.layer_s)
    rows = []
    for budget_ms, utilization in cases:
        row: dict[str, Any] = {"budget_ms": budget_ms, "load": utilization}
        rate = utilization * capacity
        for name, exits in policies.items():
            runs = [simulate(recorded, exits, costs, budget_ms / 1000, rate, seed) for seed in range(seeds)]
            row[name] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
        rows.append(row)
    return rows
