"""How much one server answers within an objective, and what that means for more of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from loadtest.client import Target, load, quantile
from loadtest.texts import Sample

WARM_S = 2.0
STEPS = 7
CONNECTIONS = 32
HEADROOM = 0.7  # of the capacity: bursts, and one replica that is being replaced


@dataclass(frozen=True)
class Step:
    """A rate that was tried, and what came of it."""

    rate: float
    p99_ms: float
    unanswered: float

    def keeps(self, slo_ms: float) -> bool:
        """Whether it is within the objective."""
        return self.p99_ms <= slo_ms and self.unanswered <= 0.001


def capacity(
    target: Target,
    samples: list[Sample],
    slo_ms: float,
    seconds: float,
    on_step: Callable[[Step], None] = lambda _: None,
) -> float:
    """The highest rate of single texts, at random times, whose p99 is within the objective; 0: none is.

    Halves the interval between what is kept and what is not. The server should not change τ meanwhile: start
    it without --slo-p99-ms.
    """
    warm = load(target, samples, WARM_S, connections=CONNECTIONS)
    kept, broken = 0.0, 1.2 * len(warm.answers) / warm.seconds
    for _ in range(STEPS):
        rate = (kept + broken) / 2
        step = _try(target, samples, rate, seconds)
        on_step(step)
        if step.keeps(slo_ms):
            kept = rate
        else:
            broken = rate
    return kept


def _try(target: Target, samples: list[Sample], rate: float, seconds: float) -> Step:
    run = load(target, samples, seconds, rate=rate, connections=CONNECTIONS)
    good = run.latencies_ms()
    unanswered = 1 - len(good) / max(1, len(run.answers))
    return Step(rate, quantile(good, 0.99) if good else math.inf, unanswered)


def advice(rate: float, slo_ms: float, wanted: float, threads: int) -> list[str]:
    """What to write where, for so many requests a second in all."""
    each = HEADROOM * rate
    replicas = max(2, math.ceil(wanted / each)) if each > 0 else 0
    waiting = max(1, round(rate * slo_ms / 1000 / 4))  # a quarter of the objective is spent waiting
    return [
        f"one replica: {rate:.0f} requests/s within {slo_ms:g} ms at p99; plan with {each:.0f}",
        f"for {wanted:g} requests/s: {replicas} replicas of {threads} cores",
        f"Kubernetes (deploy/kubernetes/de3.yaml): averageValue of de3_queue_texts: {waiting}; "
        f"maxReplicas: {2 * replicas}; DE3_SLO_P99_MS: {slo_ms:g}; cpu: {threads}",
        f"Ray (deploy/ray/app.py): cores={threads} target_requests={waiting + threads} "
        f"max_requests={4 * (waiting + threads)} max_replicas={2 * replicas}",
    ]
