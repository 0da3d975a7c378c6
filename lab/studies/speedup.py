"""Check the speed-up in model time that the server reports against the same texts at full depth."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from de3.loadtest.client import send_traffic
from de3.loadtest.metrics import Metrics
from de3.loadtest.servers import ours, running
from de3.loadtest.texts import Sample


@dataclass(frozen=True)
class Row:
    """The speed-up at one rate in one round: reported by the server at its default τ, and measured against τ = 0."""

    rate: float
    reported: float
    measured: float


def speedup(
    store: Path,
    model: str,
    samples: list[Sample],
    rates: list[float],
    rounds: int,
    seconds: float,
    port: int,
    on_row: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Measure the default τ and τ = 0 in turn, each on its own server, at every rate (requests/s)."""
    rows = []
    for _ in range(rounds):
        early, full = (_run(store, model, o, samples, rates, seconds, port) for o in ([], ["--tau", "0"]))
        for rate, (early_s, reported_s), (full_s, _) in zip(rates, early, full, strict=True):
            rows.append(Row(rate, reported_s / early_s, full_s / early_s))
            on_row(rows[-1])
    return rows


def _run(
    store: Path,
    model: str,
    options: list[str],
    samples: list[Sample],
    rates: list[float],
    seconds: float,
    port: int,
) -> list[tuple[float, float]]:
    """For each rate: mean model time of a text, and the server's estimate of it at full depth, s."""
    times = []
    with (
        TemporaryDirectory() as folder,
        running(ours(store, model, options=options), port, Path(folder) / "log") as server,
    ):
        for rate in rates:
            before = _totals(server.target.url)
            send_traffic(server.target, samples, seconds, rate=rate)
            after = _totals(server.target.url)
            texts, model_s, full_s = (b - a for a, b in zip(before, after, strict=True))
            times.append((model_s / texts, full_s / texts))
    return times


def _totals(url: str) -> tuple[float, float, float]:
    """Totals so far: texts, their model time, and its estimate at full depth, s."""
    metrics, stage = Metrics(url), "de3_stage_latency_seconds"
    return (
        metrics.total(f"{stage}_count", stage="model"),
        metrics.total(f"{stage}_sum", stage="model"),
        metrics.total("de3_full_depth_seconds_total"),
    )
