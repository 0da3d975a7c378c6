"""The throughput of one server within a latency objective, and the number of replicas needed for a total rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from de3.loadtest.client import Target, quantile, send_traffic
from de3.loadtest.texts import Sample

WARM_S = 2.0
STEPS = 7
CONNECTIONS = 32
HEADROOM = 0.7  # planned share of the capacity, which leaves room for bursts and for replacing a replica


@dataclass(frozen=True)
class Step:
    """A tested rate (requests/s), its p99, and its share of requests not answered with 200."""

    rate: float
    p99_ms: float
    unanswered: float

    def keeps(self, slo_ms: float) -> bool:
        """True if p99 meets the objective and at most 0.1% of the requests are unanswered."""
        return self.p99_ms <= slo_ms and self.unanswered <= 0.001


def capacity(
    target: Target,
    samples: list[Sample],
    slo_ms: float,
    seconds: float,
    on_step: Callable[[Step], None] = lambda _: None,
) -> float:
    """The highest tested rate (requests/s) of single texts, with Poisson arrivals, at which `Step.keeps` holds.

    Bisects, in STEPS steps, between the highest rate that met the objective (at first 0) and the lowest that did not
    (at first 1.2 times the throughput of a closed loop). Returns 0 if no tested rate met it. The server must not change
    τ during the test: start it without --slo-p99-ms.

    seconds: duration of a step. on_step: called with the result of each step.
    """
    warm_up = send_traffic(target, samples, WARM_S, connections=CONNECTIONS)
    low, high = 0.0, 1.2 * len(warm_up.answers) / warm_up.seconds
    for _ in range(STEPS):
        rate = (low + high) / 2
        step = _try(target, samples, rate, seconds)
        on_step(step)
        if step.keeps(slo_ms):
            low = rate
        else:
            high = rate
    return low


def _try(target: Target, samples: list[Sample], rate: float, seconds: float) -> Step:
    run = send_traffic(target, samples, seconds, rate=rate, connections=CONNECTIONS)
    latencies = run.latencies_ms()
    unanswered = 1 - len(latencies) / max(1, len(run.answers))
    return Step(rate, quantile(latencies, 0.99) if latencies else math.inf, unanswered)


def advice(rate: float, slo_ms: float, wanted: float, threads: int) -> list[str]:
    """Settings for a total of `wanted` requests/s, as lines of text.

    rate: the result of `capacity` for one replica. threads: cores of a replica.
    """
    planned = HEADROOM * rate
    replicas = max(2, math.ceil(wanted / planned)) if planned > 0 else 0
    pending = max(1, round(rate * slo_ms / 1000 / 4))  # allows a quarter of the objective as queue time
    return [
        f"one replica: {rate:.0f} requests/s within {slo_ms:g} ms at p99; plan with {planned:.0f}",
        f"for {wanted:g} requests/s: {replicas} replicas of {threads} cores",
        f"Kubernetes (deploy/kubernetes/de3.yaml): averageValue of de3_queue_texts: {pending}; "
        f"maxReplicas: {2 * replicas}; DE3_SLO_P99_MS: {slo_ms:g}; cpu: {threads}",
        f"Ray (deploy/ray/app.py): cores={threads} target_requests={pending + threads} "
        f"max_requests={4 * (pending + threads)} max_replicas={2 * replicas}",
    ]
